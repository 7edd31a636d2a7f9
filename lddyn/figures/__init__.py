"""Figures: one style, one colour per family of responses, one function per figure, one file a chapter.

Every function takes a table with a `seed` column (`records.frame`) and returns a matplotlib figure.
Lines are means over seeds, bands the range of the seeds.
"""

from lddyn.figures.decomposition import *  # noqa: F403
from lddyn.figures.dpo import *  # noqa: F403
from lddyn.figures.extend import *  # noqa: F403
from lddyn.figures.hero import *  # noqa: F403
from lddyn.figures.mnist import *  # noqa: F403
from lddyn.figures.sft import *  # noqa: F403
from lddyn.figures.squeezing import *  # noqa: F403
from lddyn.figures.style import *  # noqa: F403
from lddyn.figures.variants import *  # noqa: F403
