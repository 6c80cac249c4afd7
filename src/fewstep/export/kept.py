"""Where does a schedule stay, so that a saved pipeline still has it?"""

from __future__ import annotations

import json
import os
from pathlib import Path as File
from typing import Any

from fewstep.export.schedulers import scheduler_of
from fewstep.schedule import Schedule

KEY = "_fewstep_schedule"  # of a scheduler's config; diffusers keeps private keys, and warns of any other that it does not know
FILE = "fewstep_schedule.json"


def attach(schedule: Schedule, pipeline: Any) -> None:
    """Keep the schedule with a scheduler, a pipeline, or in a saved pipeline's folder; `attached` finds it there.

    In a scheduler it is one private key of the config: that survives save_pretrained, from_pretrained and from_config
    across classes, and does nothing by itself. In a folder it is the schedule's own file, fewstep_schedule.json.
    """
    if isinstance(pipeline, (str, os.PathLike)):
        schedule.save(File(pipeline) / FILE)
        return
    scheduler_of(pipeline).register_to_config(**{KEY: json.dumps(schedule.to_dict(), allow_nan=False)})


def attached(pipeline: Any) -> Schedule | None:
    """The schedule that was attached to a scheduler, a pipeline, or a folder's file or scheduler; None where there is none."""
    if isinstance(pipeline, (str, os.PathLike)):
        folder = File(pipeline)
        if (folder / FILE).is_file():
            return Schedule.load(folder / FILE)
        configs = [
            file
            for file in (folder / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json")
            if file.is_file()
        ]
        if not configs:
            raise ValueError(f"{folder} has neither {FILE} nor a scheduler_config.json: it is no folder of a pipeline")
        kept = json.loads(configs[0].read_text()).get(KEY)
    else:
        kept = scheduler_of(pipeline).config.get(KEY)
    return None if kept is None else Schedule.from_dict(json.loads(kept))
