"""GLUE's metrics are those of scipy and scikit-learn; their standard errors those of leaving each example out."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from mt_core.errors import MtError
from mt_eval.finetuning.ensemble import apply_threshold, choose_threshold
from mt_eval.finetuning.metrics import compute_f1, compute_matthews, compute_pearson, compute_spearman, measure, rank
from mt_eval.finetuning.predictions import Prediction
from mt_eval.standard_errors import compute_jackknife, compute_mean


def binary(probability, label, uid="a"):
    return Prediction(uid, label, {"0": 1 - probability, "1": probability})


def number(value, label):
    return Prediction("a", label, {"score": value})


@pytest.fixture
def classes():
    """Forty examples of which three quarters are right."""
    draws = random.Random(1)
    labels = [draws.choice("01") for _ in range(40)]
    return [binary(draws.random() / 2 + (0.1 if label == "0" else 0.4), label) for label in labels]


@pytest.fixture
def numbers():
    """Thirty examples; labels come several times, as those of STS-B do."""
    draws = random.Random(2)
    labels = [draws.randrange(11) / 2 for _ in range(30)]
    return [number(label + draws.gauss(0, 1), label) for label in labels]


def leave_one_out(examples, compute):
    """The jackknife by its definition."""
    without = [compute(examples[:n] + examples[n + 1 :]) for n in range(len(examples))]
    return math.sqrt(statistics.pvariance(without) * (len(examples) - 1))


@pytest.mark.parametrize(("name", "reference"), [("f1", f1_score), ("matthews_correlation", matthews_corrcoef)])
def test_metrics_of_two_classes_are_scikit_learn_s(classes, name, reference):
    def compute(examples):
        return reference([int(each.label) for each in examples], [int(each.prediction) for each in examples])

    value, error = measure(classes).metrics[name]
    assert 0 < value < 1
    assert value == pytest.approx(compute(classes))
    assert error == pytest.approx(leave_one_out(classes, compute))


@pytest.mark.parametrize(("name", "reference"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_correlations_are_scipy_s(numbers, name, reference):
    def compute(examples):
        return reference([each.label for each in examples], [each.prediction for each in examples]).statistic

    value, error = measure(numbers).metrics[name]
    assert 0.5 < value < 1
    assert value == pytest.approx(compute(numbers))
    assert error == pytest.approx(leave_one_out(numbers, compute))
    assert measure(numbers).counts == {"labelled": 30}


def test_ranks_of_equal_values_are_their_mean():
    values = [3.0, 1.0, 3.0, 2.0, 3.0]
    assert rank(np.array(values)).tolist() == stats.rankdata(values).tolist() == [4, 1, 4, 2, 4]


def test_what_has_no_value_is_said_to_have_none_or_is_0():
    assert measure([number(1.0, 2.0), number(1.0, 3.0)]).metrics == {}
    assert str(measure([number(1.0, 2.0), number(1.0, 3.0)])) == "2 examples"
    assert str(measure([number(1.0, None)])) == "no labels"
    assert (compute_f1((0, 0, 0, 5)), compute_matthews((3, 0, 2, 0))) == (0.0, 0.0)
    x, y = np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])  # without the first, x is constant
    assert compute_pearson(x, y)[1] is None
    assert compute_spearman(x, y)[1] is None


def test_other_classes_have_their_accuracy_alone():
    quality = measure([Prediction("a", "entailment", {"entailment": 0.7, "not_entailment": 0.3})] * 2)
    assert quality.dump() == {"correct": 2, "labelled": 2, "accuracy": 1.0, "accuracy_stderr": 0.0}


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 4.0, 4.0, 8.0]
    without = [(17 - value) / 3 for value in values]
    assert compute_jackknife(without) == pytest.approx(compute_mean(values)[1])
    assert compute_jackknife(without[:2] + without[3:], [1, 2, 1]) == pytest.approx(compute_mean(values)[1])
    assert compute_jackknife([1.0]) is None


def test_a_threshold_is_chosen_on_some_sets_and_holds_for_all():
    dev = [binary(0.30, "0"), binary(0.34, "1"), binary(0.40, "1"), binary(0.9, "1"), binary(0.9, None)]
    test = [binary(0.33, None), binary(0.35, None), binary(0.331, "0")]
    threshold = choose_threshold({"dev": dev, "test": test}, ["dev"])
    assert threshold == 0.33
    sets = apply_threshold({"dev": dev, "test": test}, threshold)
    assert [each.prediction for each in sets["test"]] == ["0", "1", "1"]
    assert measure(sets["dev"]).metrics["accuracy"][0] == 1.0
    assert choose_threshold({"dev": [binary(0.9, "1"), binary(0.2, "0")]}, ["dev"]) == 0.5


def test_a_threshold_needs_two_classes_labels_and_sets_that_are_there():
    three = {"dev": [Prediction("a", "x", {"x": 0.2, "y": 0.3, "z": 0.5})]}
    with pytest.raises(MtError, match="threshold: the classes are x, y, z; a task of two classes"):
        apply_threshold(three, 0.5)
    sets = {"dev": [binary(0.5, None)]}
    with pytest.raises(MtError, match="--tune-threshold: no example of dev has a label; sets with labels"):
        choose_threshold(sets, ["dev"])
    with pytest.raises(MtError) as error:
        choose_threshold(sets, ["test"], 0.3)
    assert [str(problem) for problem in error.value.problems] == [
        "--tune-threshold: no set 'test'; dev",
        "--threshold: 0.3, together with --tune-threshold; one of the two",
    ]
