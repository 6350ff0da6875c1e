import assert from 'node:assert/strict';
import { test } from 'node:test';

import { clock, pack, Score, sustained, unpack } from '../../app/web/player/notes.js';

const note = (on, off, pitch = 60) => ({ on, off, pitch, velocity: 64 });

test('packed notes come back', () => {
  const text = '0,500,60,64;1250,1,21,127;';
  assert.deepEqual(unpack(text), [{ on: 0, off: 0.5, pitch: 60, velocity: 64 }, { on: 1.25, off: 1.251, pitch: 21, velocity: 127 }]);
  assert.equal(pack(unpack(text)), text);
  assert.deepEqual(unpack(''), []);
});

test('the notes that sound between two times are found, also long ones', () => {
  const score = new Score([note(0, 100, 30), note(1, 2), note(50, 51), note(60, 61)]);
  const all = (from, to) => [...score.between(from, to)].map(({ on }) => on);
  assert.deepEqual(all(49, 55), [0, 50]);
  assert.deepEqual(all(1.5, 1.6), [0, 1]);
  assert.deepEqual(all(100, 200), []);
  assert.deepEqual(all(60, 60), [0], 'a note that begins at the end is not among them');
  assert.equal(score.firstFrom(2), 2);
  assert.equal(score.firstFrom(1000), 4);
  assert.equal(score.end, 100);
  assert.equal(new Score([]).end, 0);
});

test('between equals looking at every note', () => {
  let seed = 1;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  for (let round = 0; round < 50; round++) {
    const notes = Array.from({ length: 40 }, () => random() * 20).sort((a, b) => a - b).map((on) => note(on, on + 0.01 + 5 * random() ** 3));
    const score = new Score(notes), from = 20 * random(), to = from + 3 * random();
    assert.deepEqual([...score.between(from, to)], notes.filter(({ on, off }) => off > from && on < to));
  }
});

test('the pedal holds notes until it comes up or their key is struck again', () => {
  const played = [note(0, 1, 60), note(1, 2, 64), note(3, 3.5, 60)];
  const offs = (pedals) => sustained(played, pedals).map(({ off }) => off);
  assert.deepEqual(offs([]), [1, 2, 3.5]);
  assert.deepEqual(offs([[0.5, 2.5]]), [2.5, 2.5, 3.5]);
  assert.deepEqual(offs([[0.5, 9]]), [3, 9, 9], 'the first ends when its key is struck again');
  assert.deepEqual(offs([[1, 1.5]]), [1.5, 2, 3.5], 'the pedal goes down as the key comes up');
});

test('lengths are written as Python writes them', () => {
  assert.deepEqual([0, 5.4, 65, 3599.6, 7325].map(clock), ['0:00', '0:05', '1:05', '1:00:00', '2:02:05']);
});
