import assert from 'node:assert/strict';
import { mock, test } from 'node:test';

import { Duet } from '../../app/web/player/duet.js';

globalThis.window = new EventTarget();
globalThis.document = { baseURI: 'http://host/', hidden: false };
globalThis.WebSocket = class {
  static last;
  constructor() { WebSocket.last = this; }
  send() {}
  close() {}
  receive(message) { this.onmessage({ data: JSON.stringify(message) }); }
};

/** A duet whose piano only says what it does. */
function stage() {
  const struck = [], piano = {
    now: 0,
    strike(pitch) { const voice = { pitch, source: new EventTarget() }; struck.push(voice); return voice; },
    release(voice, when, fade) { Object.assign(voice, { until: when, fade }); },
  };
  const player = { piano, instrument: { listeners: [] }, face: { touch() {} }, tell() {}, shelf: { takes: { all: new Map(), keep() {} } } };
  const duet = new Duet(player);
  duet.start({ until: 0, score: { notes: [] } }, 0.5);
  WebSocket.last.onopen();
  WebSocket.last.receive({ type: 'ready', session: 'secret', resumed: false, latents: 16, answers: 0 });
  return { duet, struck, keys: player.instrument.listeners[0], receive: (message) => WebSocket.last.receive(message) };
}

test('a key ends all sounds of an answer at once, also of notes that fade already', () => {
  mock.timers.enable({ apis: ['setTimeout', 'setInterval'] });
  const { duet, struck, keys, receive } = stage(), now = performance.now();
  keys.down(60, 80, now);
  keys.up(60, now + 1);
  mock.timers.tick(600); // the pause
  const events = [[0.002, 'on', 100, 80], [0.003, 'off', 100], [0.004, 'on', 64, 80]];
  receive({ type: 'music', id: 1, events, until: 0.1 });
  assert.deepEqual(struck.map(({ pitch }) => pitch), [100, 64]);
  keys.down(72, 90, performance.now());
  for (const { pitch, until, fade } of struck) assert.ok(until === 0 && 8 * fade < 0.08, `${pitch} fades out soon`);
  assert.equal(duet.sounding.size, 0);
  duet.stop();
  mock.timers.reset();
});
