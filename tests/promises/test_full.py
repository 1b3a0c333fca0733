"""Full-parameter training from the upload to a model that is proven, listed, not served from the pool, and deleted."""

import tomlkit

from tests.live_server import LiveServer, chat_rows


def test_a_model_with_weights_of_its_own(live_server: LiveServer) -> None:
    home = live_server.home
    live_server.run("models", "add", str(home / "models" / "tiny"), "--code", "tiny-whole")
    catalogue = tomlkit.parse((home / "catalogue.toml").read_text())
    catalogue["bases"]["tiny-whole"]["methods"] = ["lora", "full"]  # type: ignore[index]
    (home / "catalogue.toml").write_text(tomlkit.dumps(catalogue))
    file_id = live_server.upload(chat_rows(12))
    wanted = {"model": "tiny-whole", "training_type": "full", "hyperparameters": {"n_epochs": 2, "batch_size": 4}}
    job = live_server.wait(live_server.create_job(file_id, **wanted))
    assert job["status"] == "succeeded", job
    assert job["training_type"] == "full"
    name = job["fine_tuned_model"]
    with live_server.api() as api:
        assert name in [model["id"] for model in api.get("/models").json()["data"]]
        events = api.get(f"/fine_tuning/jobs/{job['id']}/events?limit=1000").json()["data"]
        ready = next(event for event in events if event["code"] == "model_ready")
        assert "deploy" in ready["message"]
        question = {"model": name, "messages": [{"role": "user", "content": "What is number 1?"}]}
        refused = api.post("/chat/completions", json=question)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_deployed")
        again = api.post("/fine_tuning/jobs", json={"model": name, "training_file": file_id})
        assert again.json()["error"]["code"] == "model_not_tunable"
        (folder,) = [path.parent for path in (home / "adapters").glob("*/config.json")]
        assert (folder / "tokenizer.json").is_file() and (folder / "MANIFEST.json").is_file()
        assert api.delete(f"/models/{name}").json()["deleted"] is True
        assert not folder.exists()
