"""The process that sends messages, with one more service (`json://`) and leave to dial this machine: for tests only."""

from tunewright.notifications.apprise_process import SCHEMAS, main

if __name__ == "__main__":
    main(SCHEMAS | {"json"}, lambda address, port: address == "127.0.0.1")
