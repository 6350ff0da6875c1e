// Run by node's own runner: node --test tests/js
import assert from 'node:assert/strict';
import { test } from 'node:test';

import { keepDuet, keptDuet, upTo } from '../../app/web/player/kept_duet.js';

test('a duet is cut where it was heard, and no key or pedal stays down', () => {
  const timeline = {
    notes: [[0, 1, 40, 50]],
    played: [[1, 'pedal', 127], [1.5, 'on', 60, 80], [1.6, 'on', 64, 80], [2, 'off', 60]],
    answered: [[3, 'on', 70, 60], [4, 'on', 72, 60], [4.5, 'off', 70], [6, 'off', 72]],
  };
  const kept = upTo(timeline, 4.2);
  assert.deepEqual(kept.notes, timeline.notes);
  assert.deepEqual(kept.played.slice(timeline.played.length), [[4.2, 'off', 64], [4.2, 'pedal', 0]]);
  assert.deepEqual(kept.answered, [[3, 'on', 70, 60], [4, 'on', 72, 60], [4.2, 'off', 70], [4.2, 'off', 72]]);
  assert.equal(timeline.played.length, 4, 'the duet itself goes on');
  assert.deepEqual(upTo(kept, 5), kept, 'kept again, it stays as it is');
});

test('it is kept until it is forgotten, and a full or forbidden storage does no harm', () => {
  const values = new Map();
  globalThis.sessionStorage = { getItem: (key) => values.get(key) ?? null, setItem: (key, value) => values.set(key, value), removeItem: (key) => values.delete(key) };
  assert.equal(keptDuet(), null);
  const duet = { id: 'duet-1', until: 2, pauseS: 0.8, latents: 0, timeline: { notes: [], played: [[0, 'on', 60, 1]], answered: [] } };
  keepDuet(duet);
  assert.deepEqual(keptDuet(), duet);
  keepDuet(null);
  assert.equal(keptDuet(), null);
  globalThis.sessionStorage = { getItem() { throw new Error('no'); }, setItem() { throw new Error('full'); } };
  keepDuet(duet);
  assert.equal(keptDuet(), null);
});
