"""The videos part of the interface: internalize, follow, list, download, delete."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from tests.serving.checks import refused
from tests.waiting import wait_until
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.interop.peft import load_peft
from v2l_fast.serving.schemas import ServerLimits

QUESTION = {"messages": [{"role": "user", "content": "What happens in the video?"}]}


def test_an_upload_becomes_an_adapter(serve, shapes, videos):
    live = serve(stand_in={"pause": 0.05})
    with open(videos[0], "rb") as file:
        answer = live.http.post("/v1/videos", files={"file": ("my clip.mp4", file)})
    assert answer.status_code == 202
    job = answer.json()
    assert job["adapter_id"] is None and not job["cached"] and job["name"] == "my clip.mp4"
    seen = []

    def completed() -> bool:
        seen.append((job["progress"], job["status"]))
        job.update(live.http.get(f"/v1/videos/{job['id']}").json())
        return job["status"] == "completed"

    wait_until(completed)
    assert seen == sorted(seen) and job["progress"] == 1
    assert set(job["seconds"]) >= {"decoding", "generating"}
    expected = shapes.internalize(videos[0])
    stored = live.server.store.get(job["adapter_id"])
    assert torch.equal(stored.A["down_proj"], expected.A["down_proj"])
    listed = live.http.get("/v1/videos").json()["data"]
    assert [(v["id"], v["status"], v["name"]) for v in listed] == [
        (job["adapter_id"], "completed", "my clip.mp4")
    ]
    assert listed[0]["frames"] == 8 and listed[0]["in_context"]
    # The job's id works as the model's name, too.
    answer = live.http.post("/v1/chat/completions", json={"model": job["id"], **QUESTION})
    assert answer.status_code == 200


def test_the_same_video_is_internalized_once(serve, videos, tmp_path):
    live = serve(stand_in={})
    first = live.internalize(videos[0])
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(videos[0].read_bytes())
    live.engine.internalize = None
    again = live.internalize(copy)
    assert again["cached"] and again["adapter_id"] == first["adapter_id"]
    # A limit that selects the same frames is equivalent.
    assert live.internalize(copy, max_frames=500)["adapter_id"] == first["adapter_id"]
    metrics = live.http.get("/metrics").text
    assert 'v2l_videos_total{result="cached"} 2.0' in metrics


def test_other_options_give_another_adapter(serve, videos):
    live = serve(stand_in={})
    whole = live.internalize(videos[0])
    fewer = live.internalize(videos[0], max_frames=3)
    small = live.internalize(videos[0], longest_edge=32)
    exact = live.internalize(videos[0], max_frames=20, exact_frames=True)
    assert len({v["adapter_id"] for v in (whole, fewer, small, exact)}) == 4
    frames = [live.server.store.describe(v["adapter_id"]).frames for v in (fewer, exact)]
    assert frames == [3, 20]
    assert len(list((live.server.store.folder / "videos").iterdir())) == 1


def test_a_path_on_the_server(serve, videos):
    live = serve(stand_in={}, root=videos[0].parent)
    for path in (videos[1].name, str(videos[1]), f"../{videos[1].parent.name}/{videos[1].name}"):
        answer = live.http.post("/v1/videos", json={"path": path})
        assert answer.status_code in (200, 202), answer.text
    uploaded = live.internalize(videos[1])
    assert uploaded["name"] == videos[1].name
    # Nothing was copied.
    (kept,) = (live.server.store.folder / "videos").iterdir()
    assert (kept / "video").is_symlink()


def test_downloads(serve, shapes, videos, tmp_path):
    live = serve()
    video = live.internalize(videos[0])["adapter_id"]
    answer = live.http.get(f"/v1/videos/{video}/adapter")
    (tmp_path / "a.safetensors").write_bytes(answer.content)
    adapter = shapes.attach(Adapter.load(tmp_path / "a.safetensors"))
    answer = live.http.get(f"/v1/videos/{video}/peft", params={"base": "served/name"})
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path)
    peft = load_peft(tmp_path / video)
    a, b = adapter.merged()
    assert torch.equal(peft.A["down_proj"], a["down_proj"])
    assert torch.equal(peft.B["down_proj"], adapter.scale * b["down_proj"])
    assert '"served/name"' in (tmp_path / video / "adapter_config.json").read_text()
    wait_until(lambda: not list(live.server.store.staging.folder.iterdir()))


@pytest.mark.parametrize("way", ["replaced", "a link", "a link to another"])
def test_a_file_with_other_content_is_not_sent(serve, videos, way):
    """Downloads are checked, also after an earlier download."""
    live = serve(stand_in={})
    one, other = (live.internalize(path)["adapter_id"] for path in videos[:2])
    for _ in range(2):
        assert live.http.get(f"/v1/videos/{one}/adapter").is_success
    path, foreign = live.server.store.file(one), live.server.store.file(other)
    path.unlink()
    if way == "replaced":
        path.write_bytes(foreign.read_bytes())
    else:
        path.symlink_to("/etc/hostname" if way == "a link" else foreign)
    for tail in ("adapter", "peft"):
        assert live.http.get(f"/v1/videos/{one}/{tail}").status_code == 404
    assert live.http.get(f"/v1/videos/{other}/adapter").is_success


def test_deleting(serve, videos):
    live = serve(stand_in={})
    whole, fewer = live.internalize(videos[0]), live.internalize(videos[0], max_frames=3)
    other = live.internalize(videos[1])["adapter_id"]
    kept = live.server.store.folder / "videos"
    for video, left in ((whole, 2), (fewer, 1)):
        adapter_id = video["adapter_id"]
        answer = live.http.delete(f"/v1/videos/{adapter_id}")
        assert answer.json() == {"id": adapter_id, "object": "video.deleted", "deleted": True}
        assert len(list(kept.iterdir())) == left
        for again in (
            live.http.delete(f"/v1/videos/{adapter_id}"),
            live.http.get(f"/v1/videos/{adapter_id}"),
            live.http.get(f"/v1/videos/{adapter_id}/peft"),
            live.http.get(f"/v1/videos/{adapter_id}/adapter"),
            live.http.post("/v1/chat/completions", json={"model": adapter_id, **QUESTION}),
        ):
            assert again.status_code == 404
    assert [v["id"] for v in live.http.get("/v1/videos").json()["data"]] == [other]
    assert live.internalize(videos[0])["adapter_id"] == whole["adapter_id"]


def test_listing_in_pages(serve, videos):
    live = serve(stand_in={})
    for path in videos:
        live.internalize(path)
    whole = [v["id"] for v in live.http.get("/v1/videos").json()["data"]]
    pieces = [
        live.http.get("/v1/videos", params={"limit": 1, "offset": i}).json()["data"][0]["id"]
        for i in range(3)
    ]
    assert pieces == whole and len(set(whole)) == 3


def test_uploaded_videos_take_bounded_space(serve, videos):
    """The least recently used are removed; a question with one of them in context is refused."""
    size = videos[0].stat().st_size
    live = serve(stand_in={}, limits=ServerLimits(kept_video_bytes=size))
    first = live.internalize(videos[0])["adapter_id"]
    for path in videos[1:]:
        # A video in use is not removed.
        wait_until(lambda: not live.server.videos._in_use)
        live.internalize(path)
    direct = {"model": first, "video_mode": "context", **QUESTION}
    answer = live.http.post("/v1/chat/completions", json=direct)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_gone")
    assert not live.http.get(f"/v1/videos/{first}").json()["in_context"]
    assert live.http.post("/v1/chat/completions", json={"model": first, **QUESTION}).is_success


def test_a_linked_video_that_changed(serve, videos, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "clip.mp4").write_bytes(videos[0].read_bytes())
    live = serve(stand_in={}, root=root)
    job = live.completed(live.http.post("/v1/videos", json={"path": "clip.mp4"}).json())
    (root / "clip.mp4").write_bytes(videos[1].read_bytes())
    direct = {"model": job["id"], "video_mode": "context", **QUESTION}
    answer = live.http.post("/v1/chat/completions", json=direct)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_gone")


def test_a_restart_changes_nothing(serve, shapes, videos):
    live = serve()
    ids = {live.internalize(path)["adapter_id"] for path in videos}
    answers = {i: ask(live, i) for i in ids}
    live.stop()
    again = serve()
    assert {v["id"] for v in again.http.get("/v1/videos").json()["data"]} == ids
    assert {i: ask(again, i) for i in ids} == answers
    assert again.internalize(videos[0])["cached"]


def test_adapters_of_another_model_are_not_offered(serve, shapes, videos):
    live = serve(stand_in={})
    mine = live.internalize(videos[0])["adapter_id"]
    adapter = live.server.store.get(mine)
    foreign = Adapter(
        adapter.A,
        adapter.B,
        adapter.scale,
        None,
        adapter.bias_id,
        {**adapter.provenance, "hypernetwork": "another"},
    )
    other = live.server.store.put(foreign)
    assert [v["id"] for v in live.http.get("/v1/videos").json()["data"]] == [mine]
    answer = live.http.post("/v1/chat/completions", json={"model": other, **QUESTION})
    assert answer.status_code == 404


def test_a_merged_adapter_is_the_only_one(serve, videos):
    live = serve()
    one, other = (live.internalize(path)["adapter_id"] for path in videos[:2])
    expected = ask(live, one)
    live.stop()
    live = serve(merged=one)
    assert ask(live, one) == expected
    for body in ({"model": other}, {"model": "shapes"}, {"model": one, "video_mode": "context"}):
        answer = live.http.post("/v1/chat/completions", json={**body, **QUESTION})
        error = refused(answer, 400, "other_adapter")
        assert error["param"] == "model" and f"adapter {one} only" in error["message"]


def test_usage_counts_visual_tokens(serve, videos):
    live = serve()
    video = live.internalize(videos[0])["adapter_id"]
    for mode in ("adapter", "context"):
        body = {"model": video, "video_mode": mode, **QUESTION}
        usage = live.http.post("/v1/chat/completions", json=body).json()["usage"]
        visual = usage["prompt_tokens_details"]["visual_tokens"]
        assert (visual == 0) == (mode == "adapter")
        assert usage["prompt_tokens"] > visual and usage["time_to_first_token"] > 0


def ask(live, model: str) -> str:
    answer = live.http.post("/v1/chat/completions", json={"model": model, **QUESTION})
    return answer.json()["choices"][0]["message"]["content"]
