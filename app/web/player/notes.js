// Notes of a piece. Nothing here touches the page, so that Node can test it. All times are in seconds.

/** @typedef {{on: number, off: number, pitch: number, velocity: number, held?: boolean, human?: boolean}} Note */

/**
 * Read notes that Python has packed: "onset,length,pitch,velocity;" in milliseconds.
 * @param {string} text
 * @returns {Note[]}
 */
export function unpack(text) {
  return text.split(';').slice(0, -1).map((row) => {
    const [onset, length, pitch, velocity] = row.split(',').map(Number);
    return { on: onset / 1000, off: (onset + length) / 1000, pitch, velocity };
  });
}

/**
 * The inverse of `unpack`, which also reads it in Python.
 * @param {Note[]} notes
 */
export function pack(notes) {
  const ms = (/** @type {number} */ seconds) => Math.round(1000 * seconds);
  return notes.map((note) => `${ms(note.on)},${ms(note.off) - ms(note.on)},${note.pitch},${note.velocity};`).join('');
}

/**
 * Lengthen notes that the pedal sustains: until it comes up, or until the same key is struck again.
 * @param {Note[]} notes sorted by onset
 * @param {[number, number][]} pedals from and to, in order
 * @returns {Note[]}
 */
export function sustained(notes, pedals) {
  if (!pedals.length) return notes;
  /** @type {Map<number, number>} */
  const struck = new Map(); // pitch -> onset of the next note
  return notes.map((note) => ({ ...note })).reverse().map((note) => {
    const pedal = pedals[search(pedals.length, (index) => pedals[index][1] > note.off)];
    if (pedal && pedal[0] <= note.off) note.off = Math.max(note.off, Math.min(pedal[1], struck.get(note.pitch) ?? Infinity));
    struck.set(note.pitch, note.on);
    return note;
  }).reverse();
}

/** Notes sorted by onset, with the search that drawing and playing need. */
export class Score {
  /** @param {Note[]} notes sorted by onset */
  constructor(notes) {
    this.notes = notes;
    // The latest end of this note and all before it: tells where to begin to look for sounding notes.
    this.reach = new Float64Array(notes.length);
    let latest = 0;
    notes.forEach((note, index) => { this.reach[index] = latest = Math.max(latest, note.off); });
  }

  /** When the last note ends. */
  get end() { return this.reach.at(-1) ?? 0; }

  /** Index of the first note that begins at this time or later. @param {number} at */
  firstFrom(at) { return search(this.notes.length, (index) => this.notes[index].on >= at); }

  /**
   * The notes that sound between two times.
   * @param {number} from
   * @param {number} to
   * @returns {Generator<Note>}
   */
  *between(from, to) {
    const end = this.firstFrom(to);
    for (let index = search(end, (each) => this.reach[each] > from); index < end; index++)
      if (this.notes[index].off > from) yield this.notes[index];
  }

  /** Lowest and highest key, widened to whole octaves so that a new note seldom changes them. @returns {[number, number]} */
  range() {
    let [low, high] = [48, 83];
    for (const { pitch } of this.notes) { low = Math.min(low, pitch); high = Math.max(high, pitch); }
    return [12 * Math.floor(low / 12) - 1, 12 * Math.ceil((high + 1) / 12)];
  }
}

/** The first of `count` numbers from 0 for which an ever-true-from-there condition holds; `count` if none does.
 * @param {number} count @param {(index: number) => boolean} holds */
function search(count, holds) {
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(middle)) high = middle; else low = middle + 1;
  }
  return low;
}

/**
 * A length as "1:05", as app/console.py writes it.
 * @param {number} exact in seconds
 */
export function clock(exact) {
  const seconds = Math.floor(exact + 0.5), hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
  const rest = String(seconds % 60).padStart(2, '0');
  return hours ? `${hours}:${String(minutes).padStart(2, '0')}:${rest}` : `${minutes}:${rest}`;
}
