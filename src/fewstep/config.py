"""The settings of each command, as the dataclass that its function takes. No heavy imports: `--help` reads this file."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Prediction = Literal["x0", "eps", "v", "flow", "score"]
