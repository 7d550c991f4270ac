from pipeline.core.leaves import differing
from pipeline.core.stage import Change


def test_a_list_of_tables_names_the_value_that_differs() -> None:
    before = {"tables": [{"path": "a", "folder": "x" * 50, "extra": None}]}
    now = {"tables": ({"folder": "x" * 50 + "y", "path": "a"},)}
    assert list(differing("corpus", before, now)) == [
        ("corpus.tables[0].folder", "x" * 50, "x" * 50 + "y"),
    ]
    assert list(differing("corpus", now, now)) == []


def test_other_lists_are_values_and_a_count_of_tables_is_one() -> None:
    assert list(differing("carry", ["a"], ["a", "b"])) == [("carry", ["a"], ["a", "b"])]
    one, two = [{"path": "a"}], [{"path": "b"}, {"path": "c"}]
    assert list(differing("tables", one, two)) == [
        ("tables[0].path", "a", "b"),
        ("tables", "1 entry", "2 entries"),
    ]


def test_a_change_is_said_by_its_leaves() -> None:
    before = [{"path": "captions.csv", "picture_folder": "my/nopictures", "name": "mine"}]
    now = [{"name": "mine", "path": "captions.csv", "picture_folder": "my/pictures"}]
    said = str(Change("config.corpus.tables", before, now, "always"))
    assert said == "tables[0].picture_folder my/nopictures → my/pictures"
    many = [{f"k{number}": number for number in range(6)}]
    assert str(Change("tables", [{}], many, "always")).endswith("tables[0].k3 null → 3 and 2 more")
