import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout (or where FEWSTEP_DATA says); a test that needs it skips where it is missing."""
    folder = Path(os.environ.get("FEWSTEP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set FEWSTEP_DATA to the folder that holds mnist/ and pretrained/")
    return folder
