"""`edge-rt chat`: a conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.cli.generation import answer, check_text, facts, generate_options, opened, read_text, show_text
from edge_rt.cli.options import GenerationOptions, ModelOptions, option
from edge_rt.cli.output import say, terminal, write
from edge_rt.cli.post_options import post_processed
from edge_rt.errors import ContextError, OptionError, RuleError, UserError
from edge_rt.types import Message

if TYPE_CHECKING:
    from edge_rt.registry import Registry
    from edge_rt.session import Session
    from edge_rt.types import GenerateOptions


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
        request, news = generate_options(self), list[str]()
        first, messages = _beginning(self)

        def told(error: RuleError | None) -> None:
            news.append(f"the rules stay as they were: {error}" if error else "the rules were exchanged")

        with (
            post_processed(request, self, watch=True, told=told) as (asked, registry),
            opened(self, self.policy, self.embedder, registry, self.adapter) as model,
            model.session() as session,
        ):
            chat = Chat(session, asked, first, messages, self.verbose, news, registry)
            if terminal(sys.stdin):
                say("Ctrl-C stops an answer, /help shows the commands, /quit leaves.")
            return _converse(chat)


@dataclass
class Chat:
    """A conversation under way. ``first`` holds the system message, which /clear keeps."""

    session: Session
    request: GenerateOptions
    first: list[Message]
    messages: list[Message] = field(default_factory=list)
    verbose: bool = False
    news: list[str] = field(default_factory=list)
    """What the person is to know before the next answer."""
    registry: Registry | None = None

    def turn(self, text: str) -> None:
        """Answer one message. A question that failed is not remembered."""
        while self.news:
            say(f"note: {self.news.pop(0)}")
        asked: Message = {"role": "user", "content": text}
        text, done, interrupted = answer(self.session, [*self.first, *self.messages, asked], self.request, show_text)
        if not text.endswith("\n"):
            write("\n")
        self.messages += [asked, {"role": "assistant", "content": text if done.answer is None else done.answer}]
        if interrupted:
            say("[stopped]")
        if self.verbose:
            say(facts(done))
        elif terminal(sys.stderr):
            left = f", {done.context.absent_tokens} tokens left it" if done.context.absent_tokens else ""
            say(f"[context {done.context.used} of {done.context.allowed}{left}]")

    def clear(self, argument: str) -> bool:
        """Forget what was said."""
        self.messages.clear()
        say("The conversation starts anew.")
        return True

    def save(self, argument: str) -> bool:
        """Write the conversation to a file."""
        import json

        if not argument:
            raise OptionError("/save needs the name of a file, as /save talk.json")
        text = json.dumps({"messages": [*self.first, *self.messages]}, ensure_ascii=False, indent=1)
        try:
            Path(argument).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {argument}: {(error.strerror or str(error)).lower()}") from error
        say(f"Saved; edge-rt chat --load {argument} goes on from here.")
        return True

    def reload(self, argument: str) -> bool:
        """Import a plugin's code anew."""
        if self.registry is None:
            raise OptionError("/reload is for plugins that --post or --rules name; start edge-rt chat with one of them")
        self.registry.reload(argument)
        say(f"The code of {argument} was reloaded; the next answer uses it.")
        return True

    def help(self, argument: str) -> bool:
        """Show the commands."""
        say(HELP.partition("In the conversation:\n")[2].rstrip())
        return True

    def quit(self, argument: str) -> bool:
        """Leave."""
        return False


COMMANDS = {"/help": Chat.help, "/clear": Chat.clear, "/save": Chat.save, "/reload": Chat.reload, "/quit": Chat.quit, "/exit": Chat.quit}


def _beginning(options: ChatCommand) -> tuple[list[Message], list[Message]]:
    """The system message, if any, and what was said before. Raises OptionError."""
    messages = _load(options.load) if options.load is not None else []
    first = [message for message in messages if message["role"] == "system"][:1]
    if options.system is not None:
        text = read_text(options.system[1:], "the system message") if options.system.startswith("@") else options.system
        first = [{"role": "system", "content": text}]
    return first, [message for message in messages if message["role"] != "system"]


def _load(name: str) -> list[Message]:
    import json

    try:
        messages = json.loads(read_text(name, "the conversation"))["messages"]
        if all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            return list(messages)
    except (ValueError, KeyError, TypeError):
        pass  # said below, as for messages of the wrong form
    raise OptionError(f"{name} is no conversation that /save wrote; check the name")


def _converse(chat: Chat) -> int:
    _line_editing()
    interrupted = False
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            if interrupted or not terminal(sys.stdin):
                say("")
                return 130
            interrupted = True
            say("\nCtrl-C again or /quit leaves.")
            continue
        if line is None:
            return 0
        interrupted = False
        if not _one(chat, line.strip()):
            return 0


def _one(chat: Chat, line: str) -> bool:
    """Do what one line asks for; False to leave. What the user can mend is said, and the conversation goes on."""
    command, _, argument = line.partition(" ")
    try:
        if command in COMMANDS:
            return COMMANDS[command](chat, argument.strip())
        if command.startswith("/") and command[1:].isalpha():
            raise OptionError(f"there is no command {command}; /help shows them")
        if line:
            check_text(line, "the message")
            chat.turn(line)
    except KeyboardInterrupt:
        say("\n[stopped]")  # the second Ctrl-C during one answer
    except ContextError as error:
        say(f"error: {error}, or start anew with /clear")
    except UserError as error:
        say(f"error: {error}")
    return True


def _line_editing() -> None:
    if not terminal(sys.stdin) or not terminal(sys.stdout):
        return
    try:
        import readline  # noqa: F401 - importing it gives input() editing and history
    except ImportError:
        return  # not on every system; input() works without


def _read() -> str | None:
    """One turn's text, or None at the end of the input. Raises KeyboardInterrupt."""
    lines: list[str] = []
    while True:
        line = _read_line("> " if not lines else ". ")
        if line is None:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _read_line(prompt: str) -> str | None:
    if sys.stdin is None:
        return None
    try:
        if terminal(sys.stdin) and terminal(sys.stdout):
            return input(prompt)
        if terminal(sys.stdin) and sys.stderr is not None:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    except EOFError:
        if terminal(sys.stdout):
            write("\n")
        return None
    except UnicodeDecodeError as error:
        raise OptionError(f"the input is not UTF-8 (byte {error.start}); check the terminal's encoding") from error
