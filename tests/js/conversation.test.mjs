// Run by node's own runner: node --test tests/js
import assert from 'node:assert/strict';
import { beforeEach, mock, test } from 'node:test';

import { Conversation, Pause, cut } from '../../app/web/conversation.js';

class Socket {
  static all = [];
  constructor(address) { Object.assign(this, { address, sent: [], open: true }); Socket.all.push(this); }
  send(text) { this.sent.push(JSON.parse(text)); }
  close() { this.open = false; }
  receive(message) { this.onmessage({ data: JSON.stringify(message) }); }
}

const kept = () => {
  const values = new Map();
  return { getItem: (key) => values.get(key) ?? null, setItem: (key, value) => values.set(key, value), removeItem: (key) => values.delete(key) };
};
const last = () => Socket.all.at(-1);
const conversation = (options = {}) => {
  const made = new Conversation('http://host:7860/music/?theme=dark', { socket: Socket, storage: kept(), random: () => 1, ...options });
  made.told = [];
  for (const type of ['connection', 'ready', 'answering', 'music', 'end', 'problem', 'change'])
    made.addEventListener(type, ({ detail }) => made.told.push([type, detail]));
  return made;
};
const ready = (options) => {
  const made = conversation(options);
  made.connect();
  last().onopen();
  last().receive({ type: 'ready', session: 'secret', resumed: false, latents: 961, answers: 0 });
  return made;
};
const told = (made, type) => made.told.filter(([each]) => each === type).map(([, detail]) => detail);

beforeEach(() => { Socket.all = []; mock.timers.reset(); });

test('it connects below the page, as safely as the page', () => {
  assert.equal(conversation().address, 'ws://host:7860/music/conversation');
  assert.equal(new Conversation('https://host/', { socket: Socket }).address, 'wss://host/conversation');
});

test('it opens a new conversation, and keeps its name', () => {
  const made = ready();
  assert.deepEqual(last().sent, [{ type: 'open', session: null, latents: 0 }]);
  assert.equal(made.file, 'http://host:7860/music/conversation/secret.mid');
  assert.equal(made.connection, 'ready');
});

test('what is played is sent and kept in order, to a tenth of a millisecond', () => {
  const made = ready();
  made.play([[1.00004, 'off', 60], [0.5, 'on', 60, 80]]);
  made.play([[0.9, 'pedal', 127]]);
  const events = [[0.5, 'on', 60, 80], [1, 'off', 60], [1, 'pedal', 127]];
  assert.deepEqual(made.timeline.played, events);
  assert.deepEqual(last().sent.slice(1), [{ type: 'play', events: events.slice(0, 2) }, { type: 'play', events: events.slice(2) }]);
});

test('an answer is kept as it comes, and cut where a key is pressed', () => {
  const made = ready();
  made.play([[0, 'on', 60, 80], [1, 'off', 60]]);
  const id = made.answer(2, { seconds: 10 });
  assert.deepEqual(last().sent.at(-1), { type: 'answer', id, from: 2, seconds: 10 });
  last().receive({ type: 'answering', id, at: 2.15, others: 0 });
  last().receive({ type: 'music', id, events: [[2.15, 'on', 64, 70], [2.5, 'release', 60], [3, 'on', 67, 70], [3.5, 'off', 64]], until: 3.6 });
  made.play([[3.2, 'on', 48, 90]]);
  assert.deepEqual(made.timeline.answered,
    [[2.15, 'on', 64, 70], [2.5, 'release', 60], [3, 'on', 67, 70], [3.2, 'off', 64], [3.2, 'off', 67]]);
  assert.deepEqual(last().sent.slice(-2), [{ type: 'silence', id, heard: 3.2 }, { type: 'play', events: [[3.2, 'on', 48, 90]] }]);
  last().receive({ type: 'music', id, events: [[4, 'on', 72, 70]], until: 4 });
  last().receive({ type: 'end', id, at: 3.2, why: 'silenced' });
  assert.equal(made.timeline.answered.length, 5);
  assert.deepEqual(told(made, 'end'), [{ id, at: 3.2, why: 'silenced' }]);
});

test('an answer can be silenced as long as it sounds, also when all of it has come', () => {
  const made = ready();
  const id = made.answer(0);
  last().receive({ type: 'music', id, events: [[0.2, 'on', 64, 70], [1, 'off', 64], [2, 'on', 65, 70], [3, 'off', 65]], until: 3 });
  last().receive({ type: 'end', id, at: 3, why: 'enough' });
  made.play([[2.5, 'on', 48, 90], [2.6, 'off', 48]]);
  assert.deepEqual(made.timeline.answered.at(-1), [2.5, 'off', 65]);
  assert.deepEqual(told(made, 'end').map(({ at, why }) => [at, why]), [[3, 'enough'], [2.5, 'silenced']]);
  made.play([[3.5, 'on', 50, 90]]);
  assert.deepEqual(last().sent.slice(-3).map(({ type }) => type), ['silence', 'play', 'play']);
});

test('an answer begins no earlier than it was asked for, wherever it is silenced', () => {
  const made = ready({ timeline: { answered: [[0, 'on', 64, 70], [1, 'off', 64]] } });
  const id = made.answer(2);
  made.silence(0);
  assert.deepEqual(made.timeline.answered, [[0, 'on', 64, 70], [1, 'off', 64]]);
  assert.deepEqual(last().sent.at(-1), { type: 'silence', id, heard: 2 });
});

test('keys that come up and the pedal do not end an answer', () => {
  const made = ready();
  made.answer(2);
  made.play([[2.1, 'off', 60], [2.2, 'pedal', 0]]);
  assert.equal(made.answering, true);
  assert.deepEqual(last().sent.at(-1).type, 'play');
});

test('a lost connection keeps what is played, and is made again ever more slowly', () => {
  mock.timers.enable({ apis: ['setTimeout'] });
  const made = ready();
  made.answer(0);
  last().onclose({ code: 1006, reason: '' });
  assert.equal(made.connection, 'lost');
  assert.deepEqual(told(made, 'end').map(({ why }) => why), ['lost']);
  made.play([[1, 'on', 60, 80]]);
  assert.equal(made.answer(3), null);
  assert.equal(told(made, 'problem')[0].code, 'offline');
  for (const wait of [500, 1000, 2000, 4000, 8000, 15000, 15000]) {
    const before = Socket.all.length;
    mock.timers.tick(wait - 1);
    assert.equal(Socket.all.length, before);
    mock.timers.tick(1);
    assert.equal(Socket.all.length, before + 1);
    last().onclose({ code: 1006, reason: '' });
  }
  mock.timers.tick(15000);
  last().onopen();
  assert.deepEqual(last().sent, [{ type: 'open', session: 'secret', latents: 0,
    timeline: { notes: [], played: [[1, 'on', 60, 80]], answered: [] } }]);
  last().receive({ type: 'ready', session: 'secret', resumed: true, latents: 961, answers: 4 });
  assert.equal(made.answer(3), 5);
});

test('after a reload, the server gives back what it has', () => {
  const storage = kept();
  ready({ storage });
  const made = conversation({ storage });
  made.connect();
  last().onopen();
  assert.deepEqual(last().sent, [{ type: 'open', session: 'secret', latents: 0 }]);
  const timeline = { notes: [], played: [[1, 'on', 60, 80]], answered: [] };
  last().receive({ type: 'ready', session: 'secret', resumed: true, latents: 961, answers: 1, timeline });
  assert.deepEqual(made.timeline, timeline);
});

test('a second tab takes the conversation over, and the first one does not take it back', () => {
  mock.timers.enable({ apis: ['setTimeout'] });
  const made = ready();
  last().onclose({ code: 4001, reason: 'another tab goes on' });
  mock.timers.tick(60000);
  assert.equal(Socket.all.length, 1);
  assert.deepEqual(told(made, 'connection').at(-1), { connection: 'closed', message: 'another tab goes on' });
});

test('what an old connection still says is not heard', () => {
  const made = ready();
  const old = last();
  made.connect();
  last().onopen();
  last().receive({ type: 'ready', session: 'secret', resumed: true, latents: 961, answers: 0 });
  old.onclose({ code: 1000, reason: '' });
  assert.equal(made.connection, 'ready');
});

test('another timeline takes the place of the first', () => {
  const made = ready();
  made.play([[0, 'on', 60, 80]]);
  made.replace({ notes: [[0, 1, 60, 80]] });
  assert.deepEqual(last().sent.at(-1), { type: 'replace', timeline: { notes: [[0, 1, 60, 80]], played: [], answered: [] } });
});

test('what sounds at a cut ends there', () => {
  assert.deepEqual(cut([[0, 'on', 60, 80], [1, 'off', 60], [1, 'on', 60, 80], [1, 'on', 62, 80]], 1.5),
    [[0, 'on', 60, 80], [1, 'off', 60], [1, 'on', 60, 80], [1, 'on', 62, 80], [1.5, 'off', 60], [1.5, 'off', 62]]);
  assert.deepEqual(cut([[1, 'on', 60, 80]], 0.5), []);
});

test('what came too fast for the server is sent again, once it is over', () => {
  mock.timers.enable({ apis: ['setTimeout'] });
  const made = ready();
  made.play([[0.5, 'on', 60, 80]]);
  for (let n = 0; n < 3; n++) {
    last().receive({ type: 'error', code: 'rate', message: 'too fast' });
    mock.timers.tick(2000);
  }
  assert.ok(last().sent.every(({ type }) => type !== 'replace'), 'it may still go on');
  mock.timers.tick(2000);
  assert.deepEqual(last().sent.at(-1), { type: 'replace', timeline: made.timeline });
  made.close();
});

test('a pause begins when the last key comes up', () => {
  mock.timers.enable({ apis: ['setTimeout'] });
  let pauses = 0;
  const pause = new Pause(() => pauses++, 1, { setTimeout, clearTimeout });
  pause.play([[0, 'on', 60, 80], [0, 'on', 64, 80], [0.5, 'off', 60]]);
  mock.timers.tick(5000);
  assert.equal(pauses, 0);
  pause.play([[1, 'off', 64]]);
  mock.timers.tick(999);
  pause.play([[1.5, 'pedal', 0]]);
  assert.equal(pauses, 0);
  mock.timers.tick(1);
  assert.equal(pauses, 1);
  pause.play([[2, 'on', 60, 80], [2.5, 'off', 60], [2.6, 'on', 60, 80]]);
  mock.timers.tick(5000);
  assert.equal(pauses, 1);
});
