from data_prep.rules.text import URL_INVALID
from pipeline.core import drops
from pipeline.core.records import SCHEMA_VERSION, Manifest


def manifest(stage: str, num_in: int, **dropped: int) -> Manifest:
    kept = num_in - sum(dropped.values())
    return Manifest(stage, SCHEMA_VERSION, "", "", {}, (), num_in, kept, dropped)


def test_a_stage_that_drops_more_than_a_fifth_says_why() -> None:
    assert drops.warning(manifest("filter_image", 300, evaluation_image=60)) == ""
    said = drops.warning(manifest("filter_image", 300, evaluation_image=60, too_small=1))
    assert said == "filter_image dropped 61 of 300 rows (20%): evaluation_image 60, too_small 1"
    assert drops.warning(manifest("shards", 0)) == ""


def test_few_reasons_are_named_and_the_rest_is_counted() -> None:
    reasons = {f"r{number}": number for number in range(1, 8)}
    said = drops.warning(manifest("download", 40, **reasons))
    assert said.endswith("r7 7, r6 6, r5 5, r4 4, 3 other reasons 6")


def test_the_funnel_names_the_greatest_loss_first() -> None:
    stages = [
        manifest("corpus", 300),
        manifest("filter_text", 300, too_short=10, no_chinese=2),
        manifest("filter_image", 288, evaluation_image=221),
        manifest("split", 67),
    ]
    assert drops.funnel(stages, 67) == (
        "67 samples are left of 300: filter_image dropped 221 as evaluation_image, filter_text dropped 12"
        " (too_short 10, no_chinese 2)"
    )
    assert drops.funnel(stages, 60).endswith("no_chinese 2), 7 were set aside")
    assert drops.funnel(stages[:1], 300) == ""


def test_a_stage_without_rows_says_what_it_and_the_stages_before_it_dropped() -> None:
    before = [
        manifest("corpus", 308),
        manifest("filter_text", 308, too_short=3),
        manifest("dedup", 305, twin=1),
    ]
    assert drops.nothing_left(manifest("download", 304, http_404=304), before) == (
        "no rows left of 304 after download (http_404 removed 304); loosen [download] or check the source;"
        " before it, filter_text dropped 3 as too_short, dedup dropped 1 as twin"
    )
    assert drops.nothing_left(manifest("download", 0), before[:1]) == (
        "no rows left of 0 after download (its input was empty); loosen [download] or check the source"
    )


def test_paths_that_are_no_urls_ask_for_their_folder() -> None:
    most, some = (manifest("filter_text", 10, **{URL_INVALID: count}) for count in (6, 5))
    assert "set picture_folder" in drops.warning(most)
    assert "set picture_folder" in drops.nothing_left(most, [])
    assert "set picture_folder" not in drops.warning(some)
