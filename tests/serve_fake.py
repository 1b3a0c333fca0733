"""`python -m tests.serve_fake ARGUMENTS`: the product's command line, whose engine workers are `tests.fake_worker`.

FAKE_STALL_LIMIT_S in the environment shortens the time that a client may take nothing.
"""

import os

from tunewright import cli
from tunewright.api import streaming
from tunewright.deployments import workers

if __name__ == "__main__":
    workers._MODULE = "tests.fake_worker"
    streaming.STALL_LIMIT_S = float(os.environ.get("FAKE_STALL_LIMIT_S", streaming.STALL_LIMIT_S))
    cli.main()
