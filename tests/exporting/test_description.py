import json
import re
from pathlib import Path

from conftest import describe

from exporting.description import DATASETS
from parameter import DATASET


def test_metadata_is_text():
    metadata = describe("paper", 64, 2, classes=("a cat", 'a "dog"')).metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["classes"]) == ["a cat", 'a "dog"']
    assert (metadata["num_classes"], metadata["ema"], metadata["attention"]) == ("2", "true", "full")
    assert (metadata["dataset"], describe(dataset=None).metadata()["dataset"]) == ("toy", "")


def test_license_of_each_dataset():
    assert all(DATASET.check(name) for name in DATASETS)
    assert "non-commercial research only" in describe(dataset="celeb").metadata()["data_license"]
    assert describe(dataset="toy").data.license == "mit"
    for dataset in ("folder", "another", None):
        assert describe(dataset=dataset).data.license == "unknown"
        assert "before you publish" in describe(dataset=dataset).data.terms


def test_the_keys_of_docs_export_md():
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text.partition("| key |")[2].partition("\n\n")[0], re.M)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [*describe().metadata()]
