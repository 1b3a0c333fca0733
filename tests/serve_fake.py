"""`python -m tests.serve_fake ARGUMENTS`: the product's command line, whose engine workers are `tests.fake_worker`.

FAKE_STALL_LIMIT_S in the environment shortens the time a client may take nothing; with FAKE_TRAINER `tests.fake_trainer` trains.
"""

import os

from tunewright import cli
from tunewright.api import streaming
from tunewright.deployments import workers
from tunewright.jobs.controller import JobController

if __name__ == "__main__":
    workers._MODULE = "tests.fake_worker"
    streaming.STALL_LIMIT_S = float(os.environ.get("FAKE_STALL_LIMIT_S", streaming.STALL_LIMIT_S))
    if os.environ.get("FAKE_TRAINER"):
        (JobController.__init__.__kwdefaults__ or {})["trainer_module"] = "tests.fake_trainer"
    cli.main()
