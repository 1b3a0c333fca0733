"""`python -m tests.serve_fake ARGUMENTS`: the product's command line, whose engine workers are `tests.fake_worker`.

FAKE_STALL_LIMIT_S in the environment shortens the time that a client may take nothing.
"""

import os

from tunewright import cli
from tunewright.api import streaming
from tunewright.deployments import pool

if __name__ == "__main__":
    pool._WORKER_MODULE = "tests.fake_worker"
    streaming.STALL_LIMIT_S = float(os.environ.get("FAKE_STALL_LIMIT_S", streaming.STALL_LIMIT_S))
    cli.main()
