"""The statistics behind the verdicts: one function each, from the long table of one run (one seed) to one number.

`book/claims.yml` names them; `claims` collects them over seeds. One file a chapter.
"""

from lddyn.evidence.common import *  # noqa: F403
from lddyn.evidence.decomposition import *  # noqa: F403
from lddyn.evidence.dpo import *  # noqa: F403
from lddyn.evidence.extend import *  # noqa: F403
from lddyn.evidence.mnist import *  # noqa: F403
from lddyn.evidence.sft import *  # noqa: F403
from lddyn.evidence.squeezing import *  # noqa: F403
from lddyn.evidence.sweeps import *  # noqa: F403
from lddyn.evidence.variants import *  # noqa: F403
