// clients/vectors.json, and what has no daemon at its other end: node --test

'use strict';

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const { test } = require('node:test');
const { Client, Conversation, Frames, MessagePack } = require('./edge-rt.js');

const vectors = JSON.parse(fs.readFileSync(path.join(__dirname, '..', 'vectors.json'), 'utf8'));

/** A value of the vectors: JSON, which has neither all whole numbers nor all others. */
function valueOf(found) {
  if (Array.isArray(found)) return found.map(valueOf);
  if (found === null || typeof found !== 'object') return found;
  if ('$integer' in found) return BigInt(found.$integer);
  if ('$number' in found) return { inf: Infinity, '-inf': -Infinity, nan: NaN }[found.$number];
  return Object.fromEntries(Object.entries(found).map(([key, value]) => [key, valueOf(value)]));
}

const bytes = (hex) => Buffer.from(hex, 'hex');
const thrown = (code) => (error) => error.code === code;

test('MessagePack', () => {
  assert.ok(vectors.messagepack.length > 30);
  for (const { name, hex, value } of vectors.messagepack) {
    const decoded = MessagePack.decode(bytes(hex));
    assert.deepStrictEqual(decoded, valueOf(value), name);
    assert.deepStrictEqual(MessagePack.decode(MessagePack.encode(decoded)), decoded, name);
  }
  for (const { name, hex } of vectors.not_messagepack) assert.throws(() => MessagePack.decode(bytes(hex)), thrown('bad_frame'), name);
  const circle = [];
  circle.push(circle);
  for (const value of [circle, () => 1]) assert.throws(() => MessagePack.encode(value), thrown('bad_value'));
  for (const count of [31, 32, 255, 256, 65535, 65536]) {
    const value = { text: 'x'.repeat(count), list: Array(count).fill(null), map: Object.fromEntries(Array.from({ length: count }, (_, i) => [`${i}`, i])) };
    assert.deepStrictEqual(MessagePack.decode(MessagePack.encode(value)), value, `${count}`);
  }
});

test('frames, split at every byte', () => {
  for (const { name, hex, messages } of vectors.frames) {
    const data = bytes(hex);
    for (let at = 0; at <= data.length; at++) {
      const frames = new Frames();
      const found = [...frames.feed(data.subarray(0, at)), ...frames.feed(data.subarray(at))];
      assert.deepStrictEqual(found, messages, `${name}, split at ${at}`);
    }
    const frames = new Frames();
    assert.deepStrictEqual([...data].flatMap((byte) => frames.feed(Buffer.from([byte]))), messages, name);
  }
  for (const { name, hex, code } of vectors.not_frames) assert.throws(() => new Frames().feed(bytes(hex)), thrown(code), name);
});

function sent(conversation) {
  return new Frames().feed(conversation.toSend());
}

/** Takes what has come after each step, or only at the end. */
function replay({ name, steps, text, error }, atOnce) {
  const conversation = new Conversation();
  const answers = conversation.ask('generate', { prompt: 'x', resumable: true });
  let found = '';
  const take = () => {
    for (let event; (event = conversation.take(answers)) !== null; ) if (event.event === 'delta') found += event.text;
  };
  sent(conversation);
  for (const step of steps) {
    const data = Frames.encode({ id: answers.request, ...(step.receive ?? step.receive_part) });
    if (step.break) {
      conversation.disconnected();
      conversation.greet('test');
      conversation.resume();
      const resumed = sent(conversation).filter(({ op }) => op !== 'hello');
      const expected = step.break.resumes === null ? [] : [{ id: answers.request, ...step.break.resumes }];
      assert.deepStrictEqual(resumed, expected, name);
    } else conversation.received(step.receive ? data : data.subarray(0, data.length >> 1));
    if (atOnce) take();
    for (const message of sent(conversation)) assert.ok(message.op === 'ack' && message.seq <= answers.seq, name);
  }
  take();
  assert.strictEqual(found, text, name);
  if (error === null) assert.deepStrictEqual(answers.result(), {}, name);
  else assert.throws(() => answers.result(), thrown(error), name);
}

test('resuming', () => {
  assert.ok(vectors.resume.length > 10);
  for (const scenario of vectors.resume) for (const atOnce of [true, false]) replay(scenario, atOnce);
});

test('a request that is too long is not sent', () => {
  const conversation = new Conversation();
  conversation.greeted({ limits: { frame_bytes: 100, credits: 64 } });
  assert.throws(() => conversation.ask('tokenize', { text: 'x'.repeat(100) }), thrown('frame_too_long'));
  assert.strictEqual(conversation.toSend().length, 0);
});

test('where no daemon is', async () => {
  await assert.rejects(Client.connect('/nowhere/d.sock'), { code: 'disconnected', message: /no daemon answers at .*ENOENT/ });
  await assert.rejects(Client.connect('abstract:edge-rt'), thrown('bad_value'));
});
