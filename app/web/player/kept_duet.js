// The duet that is being played, kept in this tab over a reload: the server may still have it, or be told it anew.

import { cut } from '../conversation.js';

/** @typedef {import('../conversation.js').Timeline} Timeline */
/** @typedef {import('../conversation.js').Played} Played */
/** @typedef {{id: string, until: number, pauseS: number, latents: number, timeline: Timeline}} KeptDuet `until`: its length in seconds */

const KEY = 'music-ar-duet';

/** @returns {KeptDuet | null} */
export function keptDuet() {
  try { return JSON.parse(sessionStorage.getItem(KEY) ?? 'null'); } catch { return null; }
}

/** @param {KeptDuet | null} duet null forgets it */
export function keepDuet(duet) {
  try {
    if (duet) sessionStorage.setItem(KEY, JSON.stringify(duet)); else sessionStorage.removeItem(KEY);
  } catch { /* no room or no storage: what was played is a take all the same */ }
}

/**
 * A timeline as it was at a time: of answers what was heard, and no key or pedal is down any more.
 * @param {Timeline} timeline @param {number} until @returns {Timeline}
 */
export function upTo({ notes, played, answered }, until) {
  /** @type {Set<number>} */
  const down = new Set();
  let pedal = 0;
  for (const [, kind, number] of played) {
    if (kind === 'on') down.add(number);
    else if (kind === 'off') down.delete(number);
    else pedal = number;
  }
  /** @type {Played[]} */
  const ends = [...down].map((pitch) => [until, 'off', pitch]);
  if (pedal) ends.push([until, 'pedal', 0]);
  return { notes, played: [...played, ...ends], answered: cut(answered, until) };
}
