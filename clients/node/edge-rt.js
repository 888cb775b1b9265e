// A client of edge-rt's daemon (docs/protocol.md, version 1). One file, no dependencies, Node 18 or later.
// clients/kotlin and clients/swift have the same parts with the same names: MessagePack, Frames, Conversation, Client.

'use strict';

const net = require('node:net');
const path = require('node:path');

const MAX_BYTES = 16 << 20; // of a frame, without its length
const MAX_DEPTH = 32; // maps and lists within each other
const ACK_EVERY = 8; // events of a resumable stream between two acknowledgements
const UNREAD = 64; // events of a stream that is not resumable, before no more is read from the socket
const PAUSES = [50, 200, 500, 1000, 2000]; // milliseconds between attempts to connect again

/** What the daemon answered where it could not do as asked. `code` and `fields` are the protocol's; `disconnected` is this client's. */
class EdgeRtError extends Error {
  constructor(code, message, fields = {}) {
    super(message);
    this.name = 'EdgeRtError';
    this.code = code;
    this.fields = fields;
  }
}

// ---- MessagePack -----------------------------------------------------------------------------------------------------

const UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** MessagePack without extension types and binary values. A whole number beyond 2^53 is a BigInt. */
const MessagePack = {
  /** A value as bytes. Throws EdgeRtError `bad_value`. */
  encode(value) {
    const parts = [];
    write(value, parts, 1);
    return Buffer.concat(parts);
  },

  /** The value that these bytes are. Throws EdgeRtError `bad_frame`. */
  decode(bytes) {
    const reader = new Reader(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
    const value = reader.value(1);
    if (reader.at !== bytes.length) throw new EdgeRtError('bad_frame', 'there are bytes after the value');
    return value;
  },
};

function head(code, size, number) {
  const found = Buffer.alloc(1 + size);
  found[0] = code;
  if (size) found.writeUIntBE(number, 1, size);
  return found;
}

/** A length: in the code itself if it is short (`small`: how many fit), else in 1 (if there is such a code), 2 or 4 bytes after it. */
function length(count, fix, small, code8, code16) {
  if (count < small) return head(fix | count, 0);
  if (code8 && count < 0x100) return head(code8, 1, count);
  return count < 0x10000 ? head(code16, 2, count) : head(code16 + 1, 4, count);
}

function integer(value) {
  if (value >= 0 && value < 0x80) return head(value, 0);
  if (value < 0 && value >= -32) return head(0x100 + value, 0);
  const found = Buffer.alloc(9);
  found[0] = value < 0 ? 0xd3 : 0xcf;
  if (value < 0) found.writeBigInt64BE(BigInt(value), 1);
  else found.writeBigUInt64BE(BigInt(value), 1);
  return found;
}

function write(value, parts, depth) {
  if (depth > MAX_DEPTH + 1) throw new EdgeRtError('bad_value', `more than ${MAX_DEPTH} maps and lists within each other`);
  if (value === null || value === undefined) parts.push(head(0xc0, 0));
  else if (typeof value === 'boolean') parts.push(head(value ? 0xc3 : 0xc2, 0));
  else if (typeof value === 'bigint') parts.push(integer(BigInt.asIntN(54, value) === value ? Number(value) : value));
  else if (Number.isSafeInteger(value)) parts.push(integer(value));
  else if (typeof value === 'number') {
    const found = Buffer.alloc(9);
    found[0] = 0xcb;
    found.writeDoubleBE(value, 1);
    parts.push(found);
  } else if (typeof value === 'string') {
    const data = Buffer.from(value, 'utf8');
    parts.push(length(data.length, 0xa0, 32, 0xd9, 0xda), data);
  } else if (Array.isArray(value)) {
    parts.push(length(value.length, 0x90, 16, 0, 0xdc));
    for (const one of value) write(one, parts, depth + 1);
  } else if (typeof value === 'object') {
    const entries = Object.entries(value).filter(([, one]) => one !== undefined);
    parts.push(length(entries.length, 0x80, 16, 0, 0xde));
    for (const [key, one] of entries) {
      write(key, parts, depth);
      write(one, parts, depth + 1);
    }
  } else throw new EdgeRtError('bad_value', `a ${typeof value} cannot be sent`);
}

class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  take(count) {
    if (this.at + count > this.data.length) throw new EdgeRtError('bad_frame', 'a value ends too early');
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  unsigned(size) {
    return this.take(size).readUIntBE(0, size);
  }

  value(depth) {
    const code = this.unsigned(1);
    if (code < 0x80) return code;
    if (code >= 0xe0) return code - 0x100;
    if (code < 0x90) return this.map(code & 0x0f, depth);
    if (code < 0xa0) return this.list(code & 0x0f, depth);
    if (code < 0xc0) return this.text(code & 0x1f);
    switch (code) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xca: return this.take(4).readFloatBE();
      case 0xcb: return this.take(8).readDoubleBE();
      case 0xcc: case 0xcd: case 0xce: return this.unsigned(1 << (code - 0xcc));
      case 0xcf: return narrow(this.take(8).readBigUInt64BE());
      case 0xd0: case 0xd1: case 0xd2: return this.take(1 << (code - 0xd0)).readIntBE(0, 1 << (code - 0xd0));
      case 0xd3: return narrow(this.take(8).readBigInt64BE());
      case 0xd9: case 0xda: case 0xdb: return this.text(this.unsigned(1 << (code - 0xd9)));
      case 0xdc: case 0xdd: return this.list(this.unsigned(2 << (code - 0xdc)), depth);
      case 0xde: case 0xdf: return this.map(this.unsigned(2 << (code - 0xde)), depth);
      default: throw new EdgeRtError('bad_frame', `the protocol has no values of kind 0x${code.toString(16)}`);
    }
  }

  text(count) {
    try {
      return UTF8.decode(this.take(count));
    } catch (error) {
      throw error instanceof EdgeRtError ? error : new EdgeRtError('bad_frame', 'a text is not UTF-8');
    }
  }

  list(count, depth) {
    this.deep(depth);
    const found = [];
    for (let i = 0; i < count; i++) found.push(this.value(depth + 1));
    return found;
  }

  map(count, depth) {
    this.deep(depth);
    const found = {};
    for (let i = 0; i < count; i++) {
      const key = this.value(depth + 1);
      if (typeof key !== 'string') throw new EdgeRtError('bad_frame', 'the key of a map is no text');
      const value = this.value(depth + 1);
      Object.defineProperty(found, key, { value, enumerable: true, writable: true, configurable: true }); // a key may be __proto__
    }
    return found;
  }

  deep(depth) {
    if (depth > MAX_DEPTH) throw new EdgeRtError('bad_frame', `more than ${MAX_DEPTH} maps and lists within each other`);
  }
}

function narrow(value) {
  return BigInt.asIntN(54, value) === value ? Number(value) : value;
}

// ---- frames ----------------------------------------------------------------------------------------------------------

/** Bytes in as they come, whole messages out. */
class Frames {
  constructor() {
    this.parts = [];
    this.held = 0;
  }

  /** A message as a frame. */
  static encode(message) {
    const body = MessagePack.encode(message);
    const size = Buffer.alloc(4);
    size.writeUInt32BE(body.length);
    return Buffer.concat([size, body]);
  }

  /** The messages that are complete now. Throws EdgeRtError; after that the stream cannot be read any more. */
  feed(data) {
    this.parts.push(data);
    this.held += data.length;
    const found = [];
    for (;;) {
      if (this.held < 4) return found;
      const size = this.join(4).readUInt32BE(0);
      if (size > MAX_BYTES) throw new EdgeRtError('frame_too_long', `a frame of ${size} bytes is too long`);
      if (this.held < 4 + size) return found;
      const all = this.join(this.held);
      this.parts = [all.subarray(4 + size)];
      this.held -= 4 + size;
      const message = MessagePack.decode(all.subarray(4, 4 + size));
      if (message === null || typeof message !== 'object' || Array.isArray(message)) throw new EdgeRtError('bad_frame', 'a frame is no map');
      found.push(message);
    }
  }

  /** The first of the parts, made to hold at least so many bytes: joined when a frame is whole, not at every part of a long one. */
  join(count) {
    if (this.parts[0].length < count) this.parts = [Buffer.concat(this.parts)];
    return this.parts[0];
  }
}

// ---- the conversation ------------------------------------------------------------------------------------------------

/** What comes for one request. `request`: its id, another one after the stream was resumed. */
class Answers {
  constructor(op, request) {
    this.op = op;
    this.request = request;
    this.stream = null;
    this.seq = 0; // of the last event received
    this.taken = 0; // of the last event taken
    this.acknowledged = 0;
    this.events = [];
    this.end = null; // the answer's message
    this.cancelled = false;
    this.left = false; // nobody takes its events any more
    this.lost = false; // its connection broke, and it was not resumed yet
    this.wake = () => {}; // called when something has come
  }

  get resumable() {
    return this.stream !== null && this.end === null;
  }

  /** The answer. Throws EdgeRtError if it is one. */
  result() {
    if (this.end.error) throw errorOf(this.end.error);
    return this.end.ok;
  }
}

function errorOf({ code, message, ...fields }) {
  return new EdgeRtError(code, message, fields);
}

const GONE = { code: 'disconnected', message: 'the daemon has closed the connection' };

/** The protocol without input or output: requests in, bytes out; bytes in, answers out. Goes on with the next connection. */
class Conversation {
  constructor() {
    this.frames = new Frames();
    this.asked = new Map();
    this.broken = []; // streams to go on with in another connection
    this.number = 0;
    this.out = [];
    this.farewell = GONE;
    this.frameBytes = MAX_BYTES;
    this.ackEvery = ACK_EVERY;
  }

  /** A request. Throws EdgeRtError `frame_too_long`. */
  ask(op, fields) {
    const data = Frames.encode({ id: this.number + 1, op, ...fields });
    if (data.length - 4 > this.frameBytes) {
      throw new EdgeRtError('frame_too_long', `a request of ${data.length - 4} bytes is too long; ${this.frameBytes} are allowed`);
    }
    const answers = new Answers(op, ++this.number);
    this.asked.set(answers.request, answers);
    this.out.push(data);
    return answers;
  }

  /** The first request of a connection. */
  greet(client, key) {
    this.out = []; // what was to be sent before was the other connection's, and so was what has come
    this.frames = new Frames();
    this.frameBytes = MAX_BYTES;
    return this.ask('hello', { versions: [1], client, key });
  }

  /** What hello was answered. */
  greeted(hello) {
    this.frameBytes = hello.limits.frame_bytes;
    this.ackEvery = Math.max(1, Math.min(ACK_EVERY, Math.floor(hello.limits.credits / 2)));
  }

  /** After hello in another connection: go on with the streams that broke. */
  resume() {
    for (const answers of this.broken.splice(0)) {
      const again = this.ask('resume', { stream: answers.stream, after: answers.seq });
      answers.request = again.request;
      answers.lost = false;
      answers.acknowledged = answers.seq; // by `after`
      this.asked.set(answers.request, answers);
      if (answers.cancelled) this.ask('cancel', { request: answers.request });
    }
  }

  /** The generation is to end soon. */
  cancel(answers) {
    if (answers.cancelled || answers.end !== null) return;
    answers.cancelled = true;
    if (this.asked.has(answers.request)) this.ask('cancel', { request: answers.request }); // else when it is resumed
  }

  /** Nobody takes its events any more. */
  leave(answers) {
    answers.left = true;
    while (this.take(answers) !== null);
    this.cancel(answers);
  }

  /** The next event, null if there is none now. What is taken is acknowledged, so that the daemon waits for who is slow. */
  take(answers) {
    const message = answers.events.shift() ?? null;
    if (message !== null) answers.taken = message.seq ?? 0;
    this.acknowledge(answers);
    return message;
  }

  acknowledge(answers) {
    if (answers.stream === null || answers.lost) return;
    const over = answers.end !== null && answers.events.length === 0;
    if (over) answers.taken = answers.end.seq ?? answers.seq;
    if (answers.taken - answers.acknowledged < (over ? 1 : this.ackEvery)) return;
    answers.acknowledged = answers.taken;
    this.out.push(Frames.encode({ op: 'ack', stream: answers.stream, seq: answers.taken }));
  }

  /** Bytes came. Throws EdgeRtError if they are none of the daemon's. */
  received(data) {
    for (const message of this.frames.feed(data)) this.took(message);
  }

  took(message) {
    const answers = this.asked.get(message.id);
    if (answers === undefined) {
      if (message.id === null && message.error) this.farewell = message.error;
      return;
    }
    answers.seq = message.seq ?? answers.seq;
    if (message.event === undefined) {
      answers.end = message;
      this.asked.delete(answers.request);
    } else if (message.event === 'stream') answers.stream = message.stream;
    else answers.events.push(message);
    if (answers.left) while (this.take(answers) !== null);
    else if (answers.end !== null) this.acknowledge(answers);
    answers.wake();
  }

  /** Whether somebody does not take what comes, and the daemon would not wait by itself. */
  get full() {
    return [...this.asked.values()].some((one) => one.stream === null && one.events.length >= UNREAD);
  }

  /** What was asked is not answered any more, but for streams that can be resumed. */
  disconnected() {
    const asked = [...this.asked.values()];
    const farewell = this.farewell;
    this.asked.clear();
    this.out = [];
    this.frames = new Frames();
    this.farewell = GONE;
    for (const answers of asked) {
      answers.lost = answers.resumable;
      if (answers.lost) this.broken.push(answers);
      else answers.end = { error: farewell };
      answers.wake();
    }
  }

  /** There is no other connection for the streams that broke. */
  giveUp(error) {
    for (const answers of this.broken.splice(0)) {
      answers.end = { error: { code: error.code, message: error.message } };
      answers.wake();
    }
  }

  /** Bytes to write now. */
  toSend() {
    return Buffer.concat(this.out.splice(0));
  }
}

// ---- the client ------------------------------------------------------------------------------------------------------

/** Where the user's daemon listens if it was not told otherwise. Throws EdgeRtError `bad_value` if the system does not say where. */
function defaultAddress() {
  if (process.env.EDGE_RT_SOCKET) return process.env.EDGE_RT_SOCKET;
  if (process.env.XDG_RUNTIME_DIR) return path.join(process.env.XDG_RUNTIME_DIR, 'edge-rt', 'daemon.sock');
  throw new EdgeRtError('bad_value', 'neither EDGE_RT_SOCKET nor XDG_RUNTIME_DIR is set; give an address');
}

/** `unix:PATH` or a path, `tcp:HOST:PORT`, as net.connect takes it. Throws EdgeRtError `bad_value`. */
function parse(address) {
  if (address.startsWith('tcp:')) {
    const at = address.lastIndexOf(':');
    return { host: address.slice(4, at), port: Number(address.slice(at + 1)) };
  }
  if (address.startsWith('abstract:')) throw new EdgeRtError('bad_value', 'Node connects to no abstract sockets; give a path');
  return { path: address.startsWith('unix:') ? address.slice(5) : address };
}

/**
 * A connection to the daemon, for any number of requests at once. Streams that are `resumable` go on when it breaks; what is asked
 * after that connects again. Everything rejects with EdgeRtError.
 */
class Client {
  /** Connect. `key`: for TCP. */
  static async connect(address = defaultAddress(), { key } = {}) {
    const client = new Client(address, key);
    await client.open();
    return client;
  }

  /** Use Client.connect. */
  constructor(address, key) {
    this.address = address;
    this.key = key;
    this.hello = null; // what the daemon said of itself: version, server, capabilities, limits
    this.conversation = new Conversation();
    this.socket = null; // after hello
    this.opening = null;
    this.closed = false;
  }

  /** Ask, and wait for the answer. */
  async call(op, fields = {}) {
    const answers = await this.ask(op, fields);
    await this.over(answers);
    return answers.result();
  }

  /** Answer a prompt, a text or a list of messages. `resumable`: it goes on when the connection breaks. The rest are options. */
  generate(prompt, { session, priority, resumable, ...options } = {}) {
    const said = typeof prompt === 'string' ? { prompt } : { messages: prompt };
    return new Generation(this, { ...said, session, priority, resumable, options });
  }

  /** Embeddings of texts, in their order: a list of numbers for each. `options`: `pooling`, `normalize`, `dimensions`. */
  async embed(texts, options = {}) {
    const found = [];
    for await (const event of new Generation(this, { ...options, texts }, 'embed')) if (event.event === 'embedding') found.push(event.embedding);
    return found;
  }

  /** Open a session. `keep`: it outlives this connection for a while. */
  async openSession({ keep, context } = {}) {
    return new Session(this, (await this.call('open_session', { keep, context })).session);
  }

  /** Open a session that was saved under a name. */
  async restoreSession(name, { keep } = {}) {
    return new Session(this, (await this.call('restore_session', { name, keep })).session);
  }

  /** The user's saved sessions: `name`, `bytes`, and when each was `saved`, in seconds since 1970. */
  async savedSessions() {
    return (await this.call('list_saved')).saved;
  }

  /** Delete what was saved under a name. */
  async deleteSaved(name) {
    await this.call('delete_saved', { name });
  }

  /** What the daemon is at. */
  status() {
    return this.call('status');
  }

  /** Leave; what runs for this connection ends. */
  close() {
    this.closed = true;
    this.flush();
    this.socket?.destroySoon();
    this.lost();
    this.conversation.giveUp(new EdgeRtError('disconnected', 'the client was closed'));
  }

  async ask(op, fields) {
    if (this.closed) throw new EdgeRtError('disconnected', 'the client was closed');
    if (this.socket === null) await this.openAgain();
    const answers = this.conversation.ask(op, fields);
    this.flush();
    return answers;
  }

  over(answers) {
    return new Promise((resolve) => {
      answers.wake = () => answers.end !== null && resolve();
      answers.wake();
    });
  }

  flush() {
    const data = this.conversation.toSend();
    if (data.length) this.socket?.write(data);
    if (this.socket?.isPaused() && !this.conversation.full) this.socket.resume();
  }

  /** A connection in which hello was said. */
  async open() {
    const socket = net.connect(parse(this.address));
    const hello = this.conversation.greet('edge-rt-node/1', this.key);
    socket.write(this.conversation.toSend());
    socket.on('data', (data) => this.received(socket, data));
    let failure = null;
    socket.on('error', (error) => (failure = error)); // 'close' comes after it
    socket.on('close', () => this.lost(socket, hello));
    await this.over(hello);
    try {
      this.hello = hello.result();
    } catch (error) {
      socket.destroy();
      if (failure === null || error.code !== 'disconnected') throw error;
      throw new EdgeRtError('disconnected', `no daemon answers at ${this.address}: ${failure.message}`);
    }
    if (this.closed) throw new EdgeRtError('disconnected', 'the client was closed');
    this.conversation.greeted(this.hello);
    this.socket = socket;
    this.conversation.resume();
    this.flush();
  }

  received(socket, data) {
    try {
      this.conversation.received(data);
    } catch (error) {
      socket.destroy(error); // what cannot be read is the same as its end
      return;
    }
    this.flush();
    if (this.socket !== null && this.conversation.full) socket.pause();
  }

  /** The connection is gone: go on in another one, as long as there are streams to go on with. */
  lost(socket = this.socket, hello = null) {
    if (socket !== this.socket && (hello === null || hello.end !== null)) return; // one of which that is known
    this.socket = null;
    this.conversation.disconnected();
    if (this.conversation.broken.length && !this.closed) this.openAgain().catch(() => {}); // the streams were told by giveUp
  }

  openAgain() {
    this.opening ??= this.attempts().finally(() => (this.opening = null));
    return this.opening;
  }

  async attempts() {
    for (let turn = 0; ; turn++) {
      try {
        return await this.open();
      } catch (error) {
        if (this.closed || error.code !== 'disconnected' || turn === PAUSES.length) {
          this.conversation.giveUp(error);
          throw error;
        }
        await new Promise((resolve) => setTimeout(resolve, PAUSES[turn]));
      }
    }
  }
}

/** The events of one answer, to be taken with `for await`, by one reader; the last is `done`. Leaving the loop cancels it. */
class Generation {
  /** Use Client.generate. */
  constructor(client, fields, op = 'generate') {
    this.client = client;
    this.asking = client.ask(op, fields);
    this.asking.catch(() => {}); // whoever takes the first event hears of it
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  /** The next event. Rejects with EdgeRtError. */
  async next() {
    const answers = await this.asking;
    for (;;) {
      const value = this.client.conversation.take(answers);
      this.client.flush();
      if (value !== null) return { value, done: false };
      if (answers.end !== null) {
        answers.result();
        return { value: undefined, done: true };
      }
      await new Promise((resolve) => (answers.wake = resolve));
    }
  }

  /** The loop was left. */
  async return(value) {
    const answers = await this.asking;
    this.client.conversation.leave(answers);
    this.client.flush();
    return { value, done: true };
  }

  /** It is to end soon; its events go on until `done`, whose reason is then `cancelled`. */
  async cancel() {
    this.client.conversation.cancel(await this.asking);
    this.client.flush();
  }

  /** All of its text. */
  async text() {
    let found = '';
    for await (const event of this) if (event.event === 'delta') found += event.text;
    return found;
  }
}

/** A session in the daemon. */
class Session {
  /** Use Client.openSession or Client.restoreSession. */
  constructor(client, id) {
    this.client = client;
    this.id = id;
  }

  generate(prompt, options = {}) {
    return this.client.generate(prompt, { ...options, session: this.id });
  }

  /** Another session that goes on from what was said in this one. */
  async clone({ keep } = {}) {
    return new Session(this.client, (await this.client.call('clone_session', { session: this.id, keep })).session);
  }

  /** Keep it under a name, in the daemon's folder. */
  async save(name) {
    await this.client.call('save_session', { session: this.id, name });
  }

  async close() {
    await this.client.call('close_session', { session: this.id });
  }
}

module.exports = { Client, Conversation, EdgeRtError, Frames, Generation, MessagePack, Session, defaultAddress };
