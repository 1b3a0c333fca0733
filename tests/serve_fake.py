"""`python -m tests.serve_fake ARGUMENTS`: the product's command line, whose engine workers are `tests.fake_worker`."""

from tunewright import cli
from tunewright.deployments import pool

if __name__ == "__main__":
    pool._WORKER_MODULE = "tests.fake_worker"
    cli.main()
