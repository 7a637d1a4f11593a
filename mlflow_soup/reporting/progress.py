"""Words about work that takes long, for log files, where no progress bar is shown."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from statistics import median


def ends_by(left: int, took: Sequence[float]) -> str:
    """When a long work will end: `ends by 08:55:12`, in local time.

    The median counts: the first part takes longer, while workers start and models are read.

    Args:
        left: how many parts are left.
        took: the seconds of each part that was done.
    """
    end = datetime.now().astimezone() + timedelta(seconds=left * median(took))
    return f"ends by {end:%H:%M:%S}"
