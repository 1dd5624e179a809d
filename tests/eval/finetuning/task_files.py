"""Tiny sets in the layouts of MNLI, QQP, GLUE's other tasks and RACE, and a BERT of toy size; all of it is our own."""

import json
from pathlib import Path

from mt_core.checkpoint import native
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.build import build_tokenizer
from mt_models.canonical import canonical_state
from mt_models.config import BertConfig

MNLI_HEADER = (
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2"),
)
ACTS = {
    "eating": ("eats a meal", "reads a letter"),
    "sleeping": ("is asleep", "is wide awake"),
    "running": ("moves fast", "stands still"),
    "singing": ("makes music", "keeps silent"),
    "cooking": ("prepares food", "repairs a car"),
    "swimming": ("is in the water", "is on dry land"),
    "laughing": ("is amused", "is crying"),
    "writing": ("puts words on paper", "plays football"),
}
"""What somebody does, what follows from it, and what cannot be at the same time."""
PEOPLE = ("The man", "A woman", "My friend", "The teacher", "A child", "The doctor")
PLACES = ("in the old house", "at noon", "near the river", "with great care")


def entailment_rows(people: tuple[str, ...] = PEOPLE) -> list[tuple[str, str, str]]:
    """Premise, hypothesis and gold label: what follows from somebody's doing, and what contradicts it."""
    rows = []
    for p, person in enumerate(people):
        for n, (act, (follows, contradicts)) in enumerate(ACTS.items()):
            premise = f"{person} is {act} {PLACES[(p + n) % len(PLACES)]}."
            rows += [
                (premise, f"{person} {follows}.", "entailment"),
                (premise, f"{person} {contradicts}.", "contradiction"),
            ]
    return rows


def write_mnli(path: Path, rows: list[tuple[str, str, str]], *, labelled: bool = True) -> Path:
    """A file as GLUE has them: parses in the middle, the label in the last column but for tests."""
    names = [*MNLI_HEADER, *(["label1", "gold_label"] if labelled else [])]
    lines = ["\t".join(names)]
    for number, (premise, hypothesis, label) in enumerate(rows):
        middle = [str(number), "7", "7e", "travel", "( a )", "( b )", "(ROOT a)", "(ROOT b)", premise, hypothesis]
        lines.append("\t".join([*middle, *([label, label] if labelled else [])]))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_tsv(path: Path, *rows: tuple[str, ...], start: str = "") -> Path:
    """Lines of columns."""
    path.write_text(start + "".join("\t".join(row) + "\n" for row in rows), "utf-8")
    return path


def write_race(folder: Path, *passages: dict[str, object]) -> Path:
    """A folder of files, one for each passage."""
    folder.mkdir(parents=True)
    for number, passage in enumerate(passages, 1):
        (folder / f"{number}.txt").write_text(json.dumps(passage), "utf-8")
    return folder


def passage(animal: str, place: str, answers: tuple[str, ...] = ("B", "D")) -> dict[str, object]:
    """Two questions, one of them a sentence with a gap."""
    return {
        "article": f"There is a {animal} .\nIt lives   in the {place}. Nobody has seen it.",
        "questions": [f"The {animal} lives in the _ .", "Who has seen it?"],
        "options": [["sea", place, "sky", "sand"], ["A man.", "Many.", "Two.", "Nobody."]],
        "answers": list(answers),
    }


RACE_WORDS = "there is a cat fox owl it lives in the wood barn tree sea sky sand nobody has seen who man many two ? ."
WORDS = sorted(
    {word for row in entailment_rows() for text in row[:2] for word in text.lower().replace(".", " .").split()}
    | {*RACE_WORDS.split()}
)
SIZES = {"layers": 1, "hidden_size": 16, "max_seq_len": 48, "init_std": 0.1}
PARTS = {
    "attention": {"heads": 2, "num_kv_heads": 2, "head_size": 8, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 32, "activation": "gelu", "bias": True},
    "norm": {"kind": "layer", "eps": 1e-12},
}


def write_tokenizer(folder: Path) -> tuple[list[Path], int]:
    """WordPieces that are the words of these sets; files and number of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    config = TokenizerConfig(type="BertWordPieceLowerCase", vocab_file=str(folder / "vocab.txt"))
    tokenizer = build_tokenizer(config)
    tokenizer.save(folder / "tokenizer")
    return sorted((folder / "tokenizer").iterdir()), tokenizer.vocab_size


def write_bert(folder: Path, **changes: object) -> Path:
    """A native checkpoint of a toy BERT with all heads of pretraining, and its tokenizer."""
    files, size = write_tokenizer(folder)
    config = BertConfig.model_validate(SIZES | PARTS | {"vocab_size": size} | changes)
    model = config.build()
    model.initialize(3)
    native.write_model(folder / "bert", config.model_dump(mode="json"), canonical_state(model).items(), files)
    return folder / "bert"
