"""Drive the server's page in headless Chromium, as a person would, on a desktop and on a phone.

    python -m tests.browser.check_page --pictures pictures/

Needs a Chromium or Chrome on the machine (``apt-get install chromium``). Exit codes: 0 the page
works, 1 it does not, 2 there is no browser.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from tests.browser import chromium
from tests.browser.chromium import PageError, Tab
from tests.serving.conftest import Running, running
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes

KEY = "a-key"
QUESTION = "What happens in the video?"
SCREENS = {
    "desktop-light": (1280, 900, False, "light"),
    "desktop-dark": (1280, 900, False, "dark"),
    "phone-light": (390, 844, True, "light"),
    "phone-dark": (390, 844, True, "dark"),
}
# A phone's, a downloader's with words and without: names have no place to break, or many.
LONG_NAMES = (
    "PXL_20240518_093012345.TS.mp4",
    "Shapes that move in a video, and what happens then - official trailer (2024) [1080p60] "
    "[x264-aac] dQw4w9WgXcQ.mp4",
    f"{'a' * 120}.mp4",
)
# Comfortable to hit with a finger (CSS pixels; WCAG 2.2 asks for 24).
TARGET = 36


def expect(holds: object, what: str) -> None:
    if not holds:
        raise PageError(what)


def check(tab: Tab, live: Running, clips: list[Path], pictures: Path) -> None:
    """The whole visit."""
    tab.device(*SCREENS["desktop-light"])
    tab.open(live.url + "/")
    give_the_key(tab)
    refuse_what_is_no_video(tab, pictures)
    stages = internalize(tab, clips[0], drop)
    expect({"Uploading", "Internalized"} <= stages, f"stages seen: {sorted(stages)}")
    ask(tab, live, QUESTION)
    for mode in ("adapter", "context"):
        pieces = tab.evaluate(f"document.querySelector('.turn .{mode} .text').childNodes.length")
        expect(pieces > 3, f"{mode}: the answer came in {pieces} pieces")
    tab.device(*SCREENS["phone-light"])
    internalize(tab, clips[1], choose)
    expect(tab.evaluate("document.querySelectorAll('#videos li').length") == 2, "two videos")
    ask(tab, live, "How many objects are there?")
    tab.device(*SCREENS["desktop-light"])
    internalize(tab, clips[0], choose)
    expect(tab.evaluate("$text('#percent')") == "was there already", "the store answers")
    everything_has_a_name(tab)
    look(tab, pictures, "")
    for clip, name in zip(clips[2:], LONG_NAMES, strict=True):
        internalize(tab, clip.rename(clip.with_name(name)), choose)
    ask(tab, live, QUESTION)
    look(tab, pictures, "-long-names")
    for _ in LONG_NAMES:
        delete_one(tab)
    survive_a_reload(tab, live)
    delete_one(tab)
    stayed_at_home(tab, live)


def look(tab: Tab, pictures: Path, kind: str) -> None:
    """Check and picture every screen."""
    for name, screen in SCREENS.items():
        tab.device(*screen)
        fits(tab, name + kind, screen[0])
        tab.picture(pictures / f"{name}{kind}.png")


def give_the_key(tab: Tab) -> None:
    tab.evaluate("globalThis.$text = (s) => document.querySelector(s).textContent; 0")
    tab.wait("!document.querySelector('#key-card').hidden")
    expect(tab.evaluate("document.activeElement.id") == "key", "the key's field has the focus")
    tab.type("wrong")
    tab.press("Enter", 13)
    tab.wait("$text('#key-error') === 'This key is not accepted.'")
    tab.evaluate("document.querySelector('#key').value = ''")
    tab.type(KEY)
    tab.press("Enter", 13)
    tab.wait("document.querySelector('#key-card').hidden")


def refuse_what_is_no_video(tab: Tab, folder: Path) -> None:
    text = folder / "notes.txt"
    text.write_text("no video")
    tab.choose_file("#file", text)
    tab.wait("$text('#add-error').includes('not a video')")
    expect(tab.evaluate("document.querySelector('#status').hidden"), "no progress is shown")
    text.unlink()


def choose(tab: Tab, clip: Path) -> None:
    tab.choose_file("#file", clip)


def drop(tab: Tab, clip: Path) -> None:
    """Drag a file from the desktop onto the page's place for it, and let go."""
    x, y = tab.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('#drop').getBoundingClientRect())"
    )
    data = {"items": [], "files": [str(clip)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        tab.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
        over = tab.evaluate("document.querySelector('#drop').classList.contains('over')")
        expect(over == (kind != "drop"), f"{kind}: where it falls is shown")


def internalize(tab: Tab, clip: Path, give: Callable[[Tab, Path], None]) -> set[str]:
    """Give the page a file; the stages that were shown until it was internalized."""
    tab.evaluate(
        """{
          globalThis.stages = new Set();
          const stage = document.querySelector('#stage');
          stage.textContent = '';
          const note = () => stages.add(stage.textContent);
          new MutationObserver(note).observe(stage, {childList: true});
        }"""
    )
    give(tab, clip)
    tab.wait("$text('#stage') === 'Internalized' && !document.querySelector('#send').disabled")
    expect(tab.evaluate("document.querySelector('#progress').value") == 1, "progress is complete")
    chosen = tab.evaluate("$text('#videos input:checked + label .name')")
    expect(chosen == clip.name, f"{clip.name} is chosen, not {chosen}")
    return set(tab.evaluate("[...stages]"))


def ask(tab: Tab, live: Running, question: str) -> None:
    """Ask with the keyboard; both answers must be those of the interface."""
    before = tab.evaluate("document.querySelectorAll('.turn').length")
    tab.evaluate("document.querySelector('#question').focus()")
    tab.evaluate("document.querySelector('#question').select()")
    tab.type(question)
    tab.press("Enter", 13)
    tab.wait(
        f"document.querySelectorAll('.turn').length === {before + 1} "
        "&& document.querySelectorAll('.turn:first-child .figures b').length === 6 "
        "&& !document.querySelector('#send').disabled"
    )
    video = tab.evaluate("document.querySelector('#videos input:checked').value")
    for mode in ("adapter", "context"):
        place = f".turn:first-child .{mode}"
        body = {
            "model": video,
            "video_mode": mode,
            "messages": [{"role": "user", "content": question}],
        }
        answer = live.http.post("/v1/chat/completions", json=body).json()
        shown = tab.evaluate(f"$text('{place} .text')")
        expect(shown == answer["choices"][0]["message"]["content"], f"{mode}: {shown}")
        figures = tab.evaluate(
            f"[...document.querySelectorAll('{place} .figures b')].map(b => b.textContent)"
        )
        usage = answer["usage"]
        expect(figures[0].endswith(" ms") and float(figures[0][:-3]) >= 0, f"{mode}: {figures}")
        visual = usage["prompt_tokens_details"]["visual_tokens"]
        expect(figures[1:] == [str(usage["prompt_tokens"]), str(visual)], f"{mode}: {figures}")
        expect((visual == 0) == (mode == "adapter"), f"{mode}: {visual} visual tokens")


def everything_has_a_name(tab: Tab) -> None:
    """A screen reader has something to say for every control."""
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "radio", "progressbar", "link", "checkbox"}
    controls = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
    expect(len(controls) >= 8, f"{len(controls)} controls")
    for node in controls:
        expect(node["name"]["value"].strip(), f"a {node['role']['value']} without a name")


def fits(tab: Tab, name: str, width: int) -> None:
    """Nothing is wider than the screen, and what is pressed is large enough."""
    wide = tab.evaluate("document.documentElement.scrollWidth")
    expect(wide <= width, f"{name}: {wide} px wide on a screen of {width}")
    outside = tab.evaluate(
        "[...document.querySelectorAll('.card *')].filter(e => e.getClientRects().length"
        " && !e.closest('.hidden-input, option') && e.getBoundingClientRect().right >"
        " e.closest('.card').getBoundingClientRect().right)"
        ".map(e => `${e.tagName} ${e.className}`)"
    )
    expect(not outside, f"{name}: outside of their card: {outside}")
    small = tab.evaluate(
        "[...document.querySelectorAll('button, label.drop, #videos label, input[type=text]')]"
        ".map(e => [e.textContent.trim() || e.id, e.getBoundingClientRect()])"
        f".filter(([, box]) => box.height && Math.min(box.height, box.width) < {TARGET})"
        ".map(([text]) => text)"
    )
    expect(not small, f"{name}: too small to press: {small}")


def survive_a_reload(tab: Tab, live: Running) -> None:
    tab.device(*SCREENS["desktop-light"])
    tab.call("Page.reload")
    tab.wait("document.querySelectorAll('#videos li').length === 2")
    expect(tab.evaluate("document.querySelector('#key-card').hidden"), "the key is remembered")


def delete_one(tab: Tab) -> None:
    count = tab.evaluate("document.querySelectorAll('#videos li').length")
    tab.evaluate("globalThis.confirm = () => true; 0")
    tab.evaluate("document.querySelector('#videos .delete').click()")
    tab.wait(f"document.querySelectorAll('#videos li').length === {count - 1}")


def stayed_at_home(tab: Tab, live: Running) -> None:
    """No request went elsewhere, and no script failed."""
    urls = {
        event["params"]["request"]["url"]
        for event in tab.events
        if event.get("method") == "Network.requestWillBeSent"
    }
    foreign = sorted(u for u in urls if not u.startswith((live.url, f"blob:{live.url}", "data:")))
    expect(len(urls) > 10 and not foreign, f"asked elsewhere: {foreign}")
    for event in tab.events:
        kind, params = event.get("method"), event.get("params", {})
        expect(kind != "Runtime.exceptionThrown", json.dumps(params)[:500])
        if kind == "Log.entryAdded":
            entry = params["entry"]
            # The browser notes every refused request; the page's own refusals are meant.
            expected = entry["source"] == "network" and any(
                f"status of {status}" in entry["text"] for status in (400, 401, 404)
            )
            expect(entry["level"] != "error" or expected, f"{entry['text']} {entry.get('url')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="keep the screenshots here")
    pictures = parser.parse_args().pictures
    binary = chromium.find()
    if binary is None:
        print("no Chromium found: apt-get install chromium, or set CHROMIUM", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = pictures or folder
        kept.mkdir(parents=True, exist_ok=True)
        scenes = sample_scenes("test", 2 + len(LONG_NAMES), 0)
        clips = [write_clip(scene, folder / f"clip{i}.mp4") for i, scene in enumerate(scenes)]
        model = Video2LoRA.from_pretrained("shapes", device="cpu")
        with running(model, folder / "store", keys=(KEY,)) as live, chromium.tab(binary) as tab:
            try:
                check(tab, live, clips, kept)
            except (PageError, httpx.HTTPError) as error:
                tab.picture(kept / "failed.png")
                print(f"the page does not work: {error}", file=sys.stderr)
                return 1
    print(f"the page works in {binary}, on {len(SCREENS)} screens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
