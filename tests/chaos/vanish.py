"""Clients that vanish without FIN or RST, in network namespaces: `unshare -rn python -m tests.chaos.vanish HOME BASE`.

Prints as JSON how many requests were under way when the link to their client went, and after how many seconds none was.
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.raw_streams import request_bytes
from tests.live_server import LiveServer
from tests.promises.test_pool import chat, worker_state

SERVER, CLIENT = "10.97.0.1", "10.97.0.2"


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def client(port: int) -> None:
    """In the inner namespace: a line of hexadecimal digits is a request to send."""
    print("here", flush=True)
    sys.stdin.readline()
    run(f"ip addr add {CLIENT}/24 dev v1")
    run("ip link set v1 up")
    connections = []
    for line in sys.stdin:
        connections.append(socket.create_connection((SERVER, port), timeout=10))
        connections[-1].sendall(bytes.fromhex(line))
        print("sent", flush=True)


def main(home: Path, base: Path) -> None:
    run("ip link set lo up")
    run("ip link add v0 type veth peer name v1")
    run(f"ip addr add {SERVER}/24 dev v0")
    run("ip link set v0 up")
    server = LiveServer(home, module="tests.serve_fake", TUNEWRIGHT_HOST=SERVER)
    server.add_base(base)
    (server.home / "workers" / "fake.json").write_text('{"step_s": 0.2}')
    server.start()
    try:
        chat(server, "tiny", "hi", max_tokens=1)
        command = ["unshare", "-n", sys.executable, "-m", "tests.chaos.vanish", str(server.port)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("no pipes")
        child.stdout.readline()
        run(f"ip link set v1 netns {child.pid}")
        child.stdin.write("\n")
        for stream in (True, True, False):
            child.stdin.write(request_bytes(server, stream=stream, max_tokens=1900).hex() + "\n")
            child.stdin.flush()
            child.stdout.readline()
        time.sleep(2)
        active = worker_state(server).active
        run(f"nsenter -t {child.pid} -n ip link set v1 down")
        left = time.monotonic()
        while worker_state(server).active and time.monotonic() - left < 60:
            time.sleep(0.1)
        print(json.dumps({"active": active, "seconds": round(time.monotonic() - left, 1)}))
        child.kill()
        child.wait()
    finally:
        server.stop()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        client(int(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
