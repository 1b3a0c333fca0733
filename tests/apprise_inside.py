"""The same service, confined as in the product: it may be named and must not get anywhere on this machine."""

from tunewright.notifications.apprise_process import SCHEMAS, main

if __name__ == "__main__":
    main(SCHEMAS | {"json"})
