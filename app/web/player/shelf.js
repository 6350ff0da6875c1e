// The takes of the player: which there are, and what is done with them.

import { compressed, midiFile } from './midi.js';
import { takeOf } from './music.js';
import { clock, unpack } from './notes.js';
import { Takes } from './takes.js';
import { rowOf, TakesList } from './takes_list.js';

/** @typedef {import('./player.js').Player} Player */
/** @typedef {import('./music.js').Music} Music */
/** @typedef {import('./music.js').Value} Value */
/** @typedef {import('./takes.js').Take} Take */
/** @typedef {import('./takes_list.js').Row} Row */

export class Shelf {
  takes = new Takes();
  /** @type {Map<string, Row>} */
  #rows = new Map();
  /** @type {Take | null} */
  #deleted = null;

  /** @param {Player} player */
  constructor(player) {
    this.player = player;
    this.list = new TakesList(player.find('takes'), {
      choose: (id) => player.choose(id), star: (id) => this.#star(id), remove: (id) => this.remove(id), again: (id) => { this.#again(id); },
    });
    this.takes.open().then(() => this.#opened());
  }

  #opened() {
    this.show();
    if (this.player.resumeDuet()) return;
    const [latest] = this.takes.list();
    if (latest && this.player.shown.id === '') this.player.choose(latest.id);
  }

  /** Keep what has been generated. @param {Music[]} variations @param {Value} value */
  keep(variations, value) {
    const now = Date.now();
    for (const [number, music] of variations.entries()) {
      if (!music.score.notes.length) continue;
      const known = this.takes.all.get(music.id);
      this.takes.keep(takeOf(music, value, known?.starred ?? false, known?.made ?? now - number)); // the first comes first in the list
    }
  }

  /** Show the list as it is now. */
  show() {
    const { player } = this, rows = this.#listed();
    this.#rows = new Map(rows.map((row) => [row.id, row]));
    this.list.show(rows, player.shown.id, () => player.face.colors());
    player.find('takes-head').hidden = !rows.length && !this.#deleted;
  }

  /** @returns {Row[]} */
  #listed() {
    const { player } = this, growing = player.generating ? player.variations : [];
    const rows = growing.map((music) => rowOfMusic(music, `Seed ${music.seed}`, `${clock(music.until)} …`));
    for (const take of this.takes.list()) {
      if (growing.some((music) => music.id === take.id)) continue;
      const old = this.#rows.get(take.id), same = old?.kept && old.until === take.until && old.starred === take.starred;
      rows.push(same ? old : rowOf(take));
    }
    if (player.prompt.score.notes.length && !this.takes.all.has(player.prompt.id)) rows.push(rowOfMusic(player.prompt, 'Prompt', clock(player.prompt.until)));
    return rows;
  }

  /** What is on the timeline as a MIDI file. @param {Music} music */
  file(music) {
    const take = this.takes.all.get(music.id);
    return take ? fileOf(take) : midiFile(music.score.notes);
  }

  /** A take as the server takes it back. @param {Take} take */
  async sent(take) {
    const { id, join, seed, latents, settings } = take;
    return { take: id, join, seed: seed ?? 0, latents, settings, midi: await compressed(fileOf(take)) };
  }

  /** @param {string} id */
  #star(id) {
    const take = this.takes.all.get(id);
    if (take) this.takes.keep({ ...take, starred: !take.starred });
    this.show();
  }

  /** @param {string} id */
  remove(id) {
    this.#deleted = this.takes.all.get(id) ?? null;
    this.takes.remove(id);
    const restore = this.player.button('restore');
    restore.hidden = !this.#deleted;
    this.show();
    restore.focus();
  }

  restore() {
    if (this.#deleted) this.takes.keep(this.#deleted);
    this.#deleted = null;
    this.player.button('restore').hidden = true;
    this.show();
  }

  /** Make a take again with another seed. @param {string} id */
  async #again(id) {
    const take = this.takes.all.get(id);
    if (take) this.player.trigger('redo', await this.sent(take));
  }
}

/** @param {Music} music @param {string} title @param {string} detail @returns {Row} */
const rowOfMusic = ({ id, score, until, join }, title, detail) => ({ id, title, detail, hint: '', score, until, join, starred: false, kept: false, made: false });

/** A take as a MIDI file, with the pedal as it was played. @param {Take} take */
export const fileOf = ({ keys, notes, pedals }) => (keys === undefined ? midiFile(unpack(notes)) : midiFile(unpack(keys), pedals));
