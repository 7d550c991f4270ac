"""A view of a run as a page that reloads itself."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from pipeline.tools.watch.text import headline, host_rows, machine_rows, progress, rate, reason_rows, tasks
from pipeline.tools.watch.watcher import Bar, View

_WIDTH, _HEIGHT = 720, 120  # of the curve, in units of its view box


def page_of(view: View, reload_seconds: float) -> str:
    """Return the page of a view; a browser loads it again until the run is done."""
    template = _template()
    rows = [machine_rows(view), reason_rows(view), host_rows(view)]
    text: str = template.render(
        view=view,
        title=headline(view),
        progress=progress(view) if view.stage is not None else "",
        clock=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.when)),
        tables=[table for table in rows if len(table) > 1],
        reload_seconds=None if view.stage is None else round(reload_seconds),
        tasks=tasks,
        **_curve(view.curve),
    )
    return text


def _curve(bars: Sequence[Bar]) -> dict[str, Any]:
    """Return what the template draws: two lines of points, their scale, and the times at both ends."""
    if not bars:
        return {"has_curve": False}
    most = max(bar.rows_per_second for bar in bars) or 1.0
    step = _WIDTH / len(bars)

    def line(values: Sequence[float | None]) -> str:
        return " ".join(
            f"{(number + 0.5) * step:.1f},{_HEIGHT * (1 - value):.1f}"
            for number, value in enumerate(values)
            if value is not None
        )

    return {
        "has_curve": True,
        "width": _WIDTH,
        "height": _HEIGHT,
        "rates": line([bar.rows_per_second / most for bar in bars]),
        "shares": line([bar.share_fetched for bar in bars]),
        "most": rate(most),
        "first_time": time.strftime("%H:%M", time.localtime(bars[0].since)),
        "last_time": time.strftime("%H:%M", time.localtime(bars[-1].since + bars[-1].seconds)),
    }


@functools.cache
def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("pipeline.tools.watch", "")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "watch.html"
    )
