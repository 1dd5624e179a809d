"""Keep the least toxic of scored texts, in a new order.

Source: docs/specs/evaluation.md §5.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_data.corpus.records import to_line
from mt_data.text_io.lines import check_inputs
from mt_eval.detoxify.score import get_toxicity, read_records


def filter_files(inputs: Sequence[Path], output: Path, *, keep: float, seed: int) -> dict[str, float]:
    """Write the `keep`, a share, of the scored texts of all files that are least toxic, shuffled; counts and scores.

    Of equally toxic texts the first ones are kept. Texts without scores are left out.
    """
    check_inputs(inputs)
    records = [record for path in inputs for record in read_records(path, scored=True)]
    scored = [(toxicity, place) for place, r in enumerate(records) if (toxicity := get_toxicity(r)) is not None]
    scored.sort()
    kept = scored[: round(keep * len(scored))]
    if not kept:
        actual = f"{keep:g} of {len(scored)} scored texts is none"
        raise MtError(str(inputs[0]), actual, "more texts, or a larger --keep")
    order = [place for _, place in kept]
    random.Random(seed).shuffle(order)
    with atomic_file(output) as file:
        file.writelines(to_line(records[place]) for place in order)
    return {
        "texts": len(records),
        "unscored": len(records) - len(scored),
        "kept": len(kept),
        "mean toxicity": sum(toxicity for toxicity, _ in scored) / len(scored),
        "mean toxicity of kept": sum(toxicity for toxicity, _ in kept) / len(kept),
        "highest of kept": kept[-1][0],
    }
