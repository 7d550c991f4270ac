"""benchmarks/README.md equals the output of its generator, and every linked script exists."""

import re

from benchmarks import readme

MEASURED = {"machine": "m", "commit": "c"}


def test_the_page_is_what_the_results_give() -> None:
    assert readme.README.read_text(encoding="utf-8") == readme.page(), "run python -m benchmarks.readme"


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", readme.page())
    assert links
    for link in links:
        assert (readme.README.parent / link).is_file(), link


def test_a_result_without_machine_and_commit_says_so() -> None:
    result = {"name": "zeroshot", "ours": 2.0, "peer": 4.0, "unit": "s", "ratio": 2.0, "equal": True}
    (row,) = readme.rows_of("new", {"results": [result]})
    assert row.cells()[1:] == ["2", "4", "2", "not recorded", "not recorded"]


def test_different_outputs_are_part_of_the_claim() -> None:
    result = {"name": "resize/plain", "ours": 2.0, "peer": None, "unit": "s", "ratio": None, "equal": False}
    (row,) = readme.rows_of("new", {"results": [result], "machine": "m", "commit": "c"})
    assert row.cells()[0].endswith("; outputs differ")
    assert row.cells()[1:] == ["2", "–", "–", "m", "c"]


def test_arms_stand_against_their_peer_in_the_mean_over_seeds() -> None:
    def runs(**means: float) -> dict[str, object]:
        names = [(arm, seed) for arm in means for seed in (0, 1)]
        return {
            "runs": [
                {"arm": arm, "seed": seed, "recall": {"style": means[arm] + seed - 0.5}} | MEASURED
                for arm, seed in names
            ]
        }

    (row,) = readme.rows_of("compute", runs(paper=40.0, together=50.0))
    assert (row.ours, row.peer, row.ratio) == (50.0, 40.0, 1.25)
    assert row.cells()[0].endswith("(training/compute.py) (together, style, 2 seeds, %)")
    locked = {"locked, seen": 20.0, "not locked, seen": 25.0}
    (row,) = readme.rows_of("locking", runs(**locked))
    assert (row.ours, row.peer) == (20.0, 25.0)


def test_an_arm_is_compared_with_its_peer_on_the_seeds_of_both() -> None:
    def run(arm: str, seed: int, recall: float) -> dict[str, object]:
        return {"arm": arm, "seed": seed, "recall": {"style": recall}, "machine": "m", "commit": f"c{seed}"}

    runs = [run("paper", 0, 10.0), run("paper", 1, 20.0), run("cheap", 1, 15.0), run("cheap", 2, 90.0)]
    (row,) = readme.rows_of("compute", {"runs": [*runs, run("alone", 5, 1.0)]})
    assert (row.name, row.ours, row.peer) == ("compute@cheap, style, 1 seed", 15.0, 20.0)
    assert (row.machine, row.commit) == ("m", "c1")
