"""A report's data with every section, and a reader of its page."""

from html.parser import HTMLParser

from data_prep.accounting.funnel import NoOpThreshold
from eval.metrics.bootstrap import Measured
from eval.metrics.recall import RetrievalScores
from eval.paper.comparison import Comparison, Line
from eval.report.data import (
    AnswerText,
    CorpusMap,
    DroppedByRule,
    Example,
    ExampleGallery,
    ExampleRow,
    FunnelStep,
    ImageQuery,
    MapPoint,
    PlantedClass,
    RecallPoint,
    ReportData,
    RowCounts,
    StageFacts,
    Thumbnail,
    TrainingPoint,
)

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.invalid/x.png onerror=alert(1)>"


def scores(r1: float) -> RetrievalScores:
    return {
        "t2i": {"r1": r1, "r5": r1 + 10, "r10": r1 + 20},
        "i2t": {"r1": r1 / 2, "r5": r1 / 2 + 10, "r10": r1 / 2 + 20},
        "mean_recall": 33.25,
    }


def make_data() -> ReportData:
    """Return a small run with every section, and hostile text wherever text comes from a corpus."""
    steps = [("english", 0), ("english", 500), ("stage1", 0), ("stage1", 400), ("stage2", 0), ("stage2", 300)]
    image = Thumbnail(7, True, "image/png", b"\x89PNG not really")
    example = Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE, b"RIFF not really")
    dropped = {"language": 20, HOSTILE: 5}
    return ReportData(
        model=f"tiny-rn {HOSTILE}",
        training_stages=("english", "stage1", "stage2"),
        facts={"model": "tiny-rn", "seed": HOSTILE},
        final_stage="stage2",
        evaluations={"表情": scores(24.0), "表情/stage1": scores(15.5), HOSTILE: scores(50.0)},
        baselines={"表情": {"chance": scores(0.08), "pixel": scores(9.9)}},
        stages=(
            StageFacts("filter_text", f"Rules {HOSTILE}", 100, 75, dropped),
            StageFacts(HOSTILE, f"Rules {HOSTILE}", 75, 75, {}),
            StageFacts("shards", "", 75, 75, {}),
        ),
        funnel=(
            FunnelStep(
                "filter_text",
                f"Rules {HOSTILE}",
                RowCounts(100, 75, dropped),
                {
                    "a": RowCounts(60, 55, {"language": 5}),
                    HOSTILE: RowCounts(40, 20, {"language": 15, HOSTILE: 5}),
                },
            ),
        ),
        training=tuple(TrainingPoint(stage, seen, 5 - seen / 200, 14.3, 1e-3) for stage, seen in steps),
        recall=tuple(
            RecallPoint(stage, seen, name, scores(seen / 20))
            for name in ("表情", HOSTILE)
            for stage, seen in steps[2:]
        ),
        galleries=(
            ExampleGallery(
                HOSTILE,
                hits=(ExampleRow(HOSTILE, 1, (image,) * 5, None),),
                misses=(ExampleRow(f"图 {HOSTILE}", None, (image,) * 5, image),),
                image_hits=(ImageQuery(image, 1, (AnswerText(HOSTILE, True),) * 5, None),),
                image_misses=(
                    ImageQuery(image, 7, (AnswerText(HOSTILE, False),) * 5, AnswerText(HOSTILE, True)),
                ),
            ),
        ),
        planted=(
            PlantedClass("english", "filter_text", "language", 20, 20),
            PlantedClass(HOSTILE, "download", "http_404", 5, 4),
        ),
        comparisons=(
            Comparison(
                4,
                f"COCO-CN {HOSTILE}",
                "zero-shot",
                "RN50",
                "CN-CLIP RN50",
                (Line("text-to-image R@1", Measured(50.0, 48.25, 51.75), 48.1), Line(HOSTILE, None, None)),
                ("Wukong",),
                (HOSTILE,),
            ),
        ),
        notes=(NoOpThreshold("filter_text", HOSTILE, 0.26, 0.2604),),
        samples=(example, Example(HOSTILE, "", "", "", None)),
        dropped=(
            DroppedByRule("filter_text", "language", 20, (example,)),
            DroppedByRule("filter_text", HOSTILE, 5, ()),
        ),
        corpus_map=CorpusMap("stage2", 0.25, (MapPoint(0.0, 0.5, example), MapPoint(1.0, 0.0, example))),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text: all of it, and that of one language with what is in none."""

    def __init__(self, html: str, language: str = "en") -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.said = ""  # what a reader of `language` sees
        self.scripts: list[str] = []
        self._hidden = "zh" if language == "en" else "en"
        self._depth = 0  # inside a span of the other language
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._tag = tag
        if tag == "span" and (self._depth or dict(attrs).get("class") == self._hidden):
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._depth:
            self._depth -= 1
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.scripts.append(data)
        elif self._tag != "style":
            self.text += f"{data} "
            self.said += "" if self._depth else f"{data} "
