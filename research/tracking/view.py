"""How the runs of an experiment are shown to be compared, as MLflow's page saves a view.

The columns and charts that a browser shows of itself are kept in that browser; what the menu
"Views" lists is a tag of the experiment, `mlflow.sharedViewState.<key>`: a name and the page's
state. MLflow documents neither; both are as its page (3.17) writes them when a view is saved by
hand, and it takes defaults for all that a state leaves out.
"""

import json
from typing import Any

VIEW = "comparison"  # also ?viewStateShareKey=comparison at the end of the address
NAME = "Loss, optimizer, learning rate"
PARAMETERS = ("Loss", "Optimizer", "Learning rate")
METRICS = ("test/accuracy", "val/accuracy")  # losses of different kinds are not comparable


def saved_view() -> str:
    """The tag's value, below the 5000 characters that MLflow allows."""
    state = {
        "orderByKey": column("metrics", "test/accuracy"),
        "orderByAsc": False,
        "selectedColumns": [
            *(column("params", name) for name in PARAMETERS),
            *(column("metrics", name) for name in METRICS),
            column("attributes", "Dataset"),
        ],
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # ours before those that the page adds
        "compareRunSections": [section("comparison", "Comparison"), section("curves", "Curves")],
        "compareRunCharts": charts(),
    }
    times = {"createdAt": 0, "updatedAt": 0}
    return json.dumps({"name": NAME, **times, "state": json.dumps(state)})


def column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def section(key: str, name: str) -> dict[str, Any]:
    return {"uuid": key, "name": name, "display": True, "isReordered": False, "deleted": False}


def charts() -> list[dict[str, Any]]:
    """Bars and parallel coordinates of what came out, curves of how it went."""
    best = {"selectedParams": [*PARAMETERS], "selectedMetrics": ["test/accuracy"]}
    return [
        chart("comparison", "PARALLEL", "choices", **best, showAllRuns=True),
        chart("comparison", "BAR", "bars", metricKey="test/accuracy"),
        chart("curves", "LINE", "accuracy", metricKey="val/accuracy"),
        chart("curves", "LINE", "loss", metricKey="train/loss"),
    ]


def chart(section: str, kind: str, key: str, **settings: Any) -> dict[str, Any]:
    common = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    if "metricKey" in settings:
        settings["selectedMetricKeys"] = [settings["metricKey"]]
    return {"uuid": key, "type": kind, "metricSectionId": section, **common, **settings}
