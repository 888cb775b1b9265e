"""`edge-rt chat`: a conversation."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.cli.generation import (
    answer,
    check_text,
    generate_options,
    opened,
    plugins_for,
    read_text,
    rulebook,
    show_text,
    summary,
    text_or_file,
)  # fmt: skip
from edge_rt.cli.options import GenerationOptions, ModelOptions, help_text, option
from edge_rt.cli.output import is_terminal, write, write_stderr
from edge_rt.errors import ContextError, OptionError, RuleError, UserError
from edge_rt.types import GenerateOptions, Message

if TYPE_CHECKING:
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.session import Session


class ChatCommand(GenerationOptions, ModelOptions):
    r"""Talk with a model.

    Ctrl-C ends the answer and not the program; at the empty prompt twice, or Ctrl-D, leaves.
    Each line of standard input is a turn where that is no terminal. A line that ends in \ goes on in the next.

    Examples:
      edge-rt chat
      edge-rt chat -m model.gguf --system "Answer in one sentence." --temp 0
      edge-rt chat --load talk.json

    In the conversation:
      /help          these commands
      /clear         forget what was said
      /save FILE     write the conversation to a file, for --load
      /reload PLUGIN import a plugin's code anew
      /quit          leave
    """

    system: str | None = option(None, "--system TEXT", "System message, or @FILE.")
    load: str | None = option(None, "--load FILE", "Go on with a conversation that /save wrote.")

    def run(self) -> int:
        request, notes = generate_options(self), list[str]()
        system, messages = _initial_messages(self)

        def note_change(error: RuleError | None) -> None:
            notes.append(f"the rules stay as they were: {error}" if error else "the rules were exchanged")

        registry = plugins_for(self)
        with (
            rulebook(self, registry, watch=True, on_change=note_change) as rules,
            opened(self, registry) as model,
            model.session() as session,
        ):
            if is_terminal(sys.stdin):
                write_stderr("Ctrl-C stops an answer, /help shows the commands, /quit leaves.")
            return _converse(Chat(session, request._replace(rules=rules), system, messages, self.verbose, notes, registry))


@dataclass
class Chat:
    """A conversation. ``system`` holds the system message, if any, which /clear keeps. ``notes`` are shown before the next answer."""

    session: Session
    request: GenerateOptions
    system: list[Message]
    messages: list[Message]
    verbose: bool
    notes: list[str]
    registry: Registry | None

    def turn(self, text: str) -> None:
        """Answer one message. If that fails, the conversation stays as it was."""
        while self.notes:
            write_stderr(f"note: {self.notes.pop(0)}")
        question: Message = {"role": "user", "content": text}
        text, done, interrupted = answer(self.session, [*self.system, *self.messages, question], self.request, show_text)
        if not text.endswith("\n"):
            write("\n")
        self.messages += [question, {"role": "assistant", "content": text if done.answer is None else done.answer}]
        if interrupted:
            write_stderr("[stopped]")
        if self.verbose:
            write_stderr(summary(done))
        elif is_terminal(sys.stderr):
            left = f", {done.context.absent_tokens} tokens left it" if done.context.absent_tokens else ""
            write_stderr(f"[context {done.context.used} of {done.context.allowed}{left}]")

    # Commands; each takes what stands behind its name and returns whether the conversation goes on.

    def clear(self, argument: str) -> bool:
        self.messages.clear()
        write_stderr("The conversation starts anew.")
        return True

    def save(self, file: str) -> bool:
        import json

        if not file:
            raise OptionError("/save needs the name of a file, as /save talk.json")
        text = json.dumps({"messages": [*self.system, *self.messages]}, ensure_ascii=False, indent=1)
        try:
            Path(file).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {file}: {(error.strerror or str(error)).lower()}") from error
        write_stderr(f"Saved; edge-rt chat --load {file} goes on from here.")
        return True

    def reload(self, plugin: str) -> bool:
        if self.registry is None:
            raise OptionError("/reload is for plugins that --post or --rules name; start edge-rt chat with one of them")
        self.registry.reload(plugin)
        write_stderr(f"The code of {plugin} was reloaded; the next answer uses it.")
        return True

    def help(self, argument: str) -> bool:
        write_stderr(help_text(ChatCommand).partition("In the conversation:\n")[2])
        return True

    def quit(self, argument: str) -> bool:
        return False


COMMANDS = {"/help": Chat.help, "/clear": Chat.clear, "/save": Chat.save, "/reload": Chat.reload, "/quit": Chat.quit, "/exit": Chat.quit}


def _initial_messages(options: ChatCommand) -> tuple[list[Message], list[Message]]:
    """The system message, if any, and the messages to go on from. Raises OptionError."""
    messages = _load(options.load) if options.load is not None else []
    system = [message for message in messages if message["role"] == "system"][:1]
    if options.system is not None:
        system = [{"role": "system", "content": text_or_file(options.system, "the system message")}]
    return system, [message for message in messages if message["role"] != "system"]


def _load(name: str) -> list[Message]:
    import json

    try:
        messages = json.loads(read_text(name, "the conversation"))["messages"]
        if all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            return list(messages)
    except (ValueError, KeyError, TypeError):
        pass  # the same error as for messages of the wrong form
    raise OptionError(f"{name} is no conversation that /save wrote; check the name")


def _converse(chat: Chat) -> int:
    """Read and answer messages until the end. Returns the exit status."""
    _enable_line_editing()
    interrupted = False
    while True:
        try:
            message = _read_message()
        except KeyboardInterrupt:
            if interrupted or not is_terminal(sys.stdin):
                write_stderr("")
                return 130
            interrupted = True
            write_stderr("\nCtrl-C again or /quit leaves.")
            continue
        interrupted = False
        if message is None or not _handle(chat, message.strip()):
            return 0


def _handle(chat: Chat, message: str) -> bool:
    """Run a command or answer a message. Reports errors that the user can correct. Returns whether the conversation goes on."""
    command, _, argument = message.partition(" ")
    try:
        if command in COMMANDS:
            return COMMANDS[command](chat, argument.strip())
        if command.startswith("/") and command[1:].isalpha():
            raise OptionError(f"there is no command {command}; /help shows them")
        if message:
            check_text(message, "the message")
            chat.turn(message)
    except KeyboardInterrupt:
        write_stderr("\n[stopped]")  # the second Ctrl-C during one answer
    except ContextError as error:
        write_stderr(f"error: {error}, or start anew with /clear")
    except UserError as error:
        write_stderr(f"error: {error}")
    return True


def _enable_line_editing() -> None:
    """Give ``input`` editing and history, where the system has them."""
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        with suppress(ImportError):
            import readline  # noqa: F401 - the import is what enables them


def _read_message() -> str | None:
    """The next message, which goes on over lines that end in a backslash; None at the end. Raises KeyboardInterrupt, OptionError."""
    lines: list[str] = []
    while (line := _read_line(". " if lines else "> ")) is not None:
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
    return "\n".join(lines) if lines else None


def _read_line(prompt: str) -> str | None:
    if sys.stdin is None:
        return None
    try:
        if is_terminal(sys.stdin) and is_terminal(sys.stdout):
            return input(prompt)
        if is_terminal(sys.stdin) and sys.stderr is not None:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    except EOFError:
        if is_terminal(sys.stdout):
            write("\n")
        return None
    except UnicodeDecodeError as error:
        raise OptionError(f"the input is not UTF-8 (byte {error.start}); check the terminal's encoding") from error
