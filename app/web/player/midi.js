// Write a MIDI file. Nothing here touches the page.

/** @typedef {import('./notes.js').Note} Note */

const TICKS_PER_QUARTER = 500; // at 120 quarters a minute, a tick is a millisecond

/**
 * A piece as a standard MIDI file of one track.
 * @param {Note[]} notes
 * @param {[number, number][]} [pedals] when the sustain pedal is down: from and to, in seconds
 * @returns {Uint8Array<ArrayBuffer>}
 */
export function midiFile(notes, pedals = []) {
  /** @type {[number, number, number[]][]} time in ms, order among those of the same time, message */
  const events = [];
  const ms = (/** @type {number} */ seconds) => Math.max(0, Math.round(1000 * seconds));
  for (const { on, off, pitch, velocity } of notes) {
    events.push([ms(on), 2, [0x90, pitch, velocity]], [Math.max(ms(off), ms(on) + 1), 0, [0x80, pitch, 64]]);
  }
  for (const [from, to] of pedals) events.push([ms(from), 3, [0xb0, 64, 127]], [ms(to), 1, [0xb0, 64, 0]]);
  events.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const track = [0, 0xff, 0x51, 3, 0x07, 0xa1, 0x20]; // 500,000 us for a quarter
  let now = 0;
  for (const [time, , message] of events) {
    track.push(...variableLength(time - now), ...message);
    now = time;
  }
  track.push(0, 0xff, 0x2f, 0);
  return Uint8Array.from([
    ...bytes('MThd'), 0, 0, 0, 6, 0, 0, 0, 1, TICKS_PER_QUARTER >> 8, TICKS_PER_QUARTER & 255,
    ...bytes('MTrk'), ...[24, 16, 8, 0].map((shift) => (track.length >> shift) & 255),
  ].concat(track));
}

/** @param {string} text */
const bytes = (text) => [...text].map((letter) => letter.charCodeAt(0));

/** @param {number} value */
function variableLength(value) {
  const parts = [value & 127];
  for (let rest = value >> 7; rest; rest >>= 7) parts.unshift(0x80 | (rest & 127));
  return parts;
}

/**
 * Bytes as a compressed text that an event can carry to the server: zlib in base64.
 * @param {Uint8Array<ArrayBuffer>} content
 */
export async function compressed(content) {
  const stream = new Blob([content]).stream().pipeThrough(new CompressionStream('deflate'));
  const packed = new Uint8Array(await new Response(stream).arrayBuffer());
  let text = '';
  for (let from = 0; from < packed.length; from += 8192) text += String.fromCharCode(...packed.subarray(from, from + 8192));
  return btoa(text);
}
