// What the timeline shows: music from Python, a take from the browser's storage, or what is being recorded.

import { pack, Score, unpack } from './notes.js';

/** @typedef {import('./notes.js').Note} Note */
/** @typedef {import('./takes.js').Take} Take */
/**
 * What Python sends; app/web/player/__init__.py describes it.
 * @typedef {{
 *   piece: string | number, kind: 'piece' | 'prompt', name: string, join: number, begins: number, generating: boolean, autoplay: boolean,
 *   message: string, start: number, end: number, chosen: number, latents: number, settings: string,
 *   variations: {take: string, seed: number | null, until: number, notes: string, open: string, pedals: [number, number][]}[],
 * }} Value
 */
/**
 * @typedef {{
 *   id: string, kind: 'piece' | 'prompt' | 'recording', score: Score, until: number, join: number, growing: boolean,
 *   turns: {from: number, to: number}[], pedals: [number, number][], seed: number | null, text: string, final: Note[], changedFrom: number,
 * }} Music
 * `text` and `final`: the notes that will not change, packed and not. `changedFrom`: where it differs from before.
 */

/** @type {Music} */
export const NOTHING = {
  id: '', kind: 'piece', score: new Score([]), until: 0, join: 0, growing: false, turns: [], pedals: [], seed: null, text: '', final: [], changedFrom: 0,
};

/**
 * Read one variation. Of a text that has grown, only what is new is read.
 * @param {Value} value @param {number} number @param {Music | undefined} before the same variation as it was
 * @returns {Music}
 */
export function received(value, number, before) {
  const { take, seed, until, notes, open, pedals } = value.variations[number];
  const grows = before !== undefined && notes.startsWith(before.text);
  const fresh = unpack(grows ? notes.slice(before.text.length) : notes);
  const final = grows ? before.final.concat(fresh) : fresh;
  // Notes that reach the end of the known music may last longer: their ends are not known yet.
  const rest = unpack(open).map((note) => ({ ...note, held: value.generating && note.off >= until - 0.02 }));
  const known = grows ? before.score.notes[before.final.length]?.on ?? before.until : 0;
  const join = value.kind === 'prompt' ? Infinity : value.join;
  return {
    turns: [{ from: 0, to: join }],
    id: value.kind === 'prompt' ? 'prompt' : take, kind: value.kind, score: new Score(final.concat(rest)), until, seed, final, text: notes,
    join: Math.min(join, until), growing: value.generating, pedals: pedals ?? [],
    changedFrom: Math.min(known, fresh[0]?.on ?? Infinity),
  };
}

/** @param {Take} take @returns {Music} */
export function stored(take) {
  const final = unpack(take.notes);
  return {
    ...NOTHING, id: take.id, kind: 'piece', score: new Score(final), until: take.until, join: take.join, pedals: take.pedals,
    turns: take.kind === 'duet' ? take.turns : [{ from: 0, to: take.join }], seed: take.seed, text: take.notes, final,
  };
}

/** @param {Music} music @param {Value} value @param {boolean} starred @param {number} made @returns {Take} */
export function takeOf(music, value, starred, made) {
  const { id, until, join, seed, pedals } = music;
  return {
    id, kind: 'made', made, notes: pack(music.score.notes), pedals, join, until, seed, latents: value.latents,
    settings: value.settings, starred, turns: [],
  };
}
