"""A program that says nothing for long."""

import time

if __name__ == "__main__":
    time.sleep(60)
