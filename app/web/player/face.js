// How the player looks: its pictures, and its state in words and numbers.

import { clock, Score } from './notes.js';
import { Roll } from './roll.js';

/** @typedef {import('./player.js').Player} Player */
/** @typedef {import('./roll.js').Colors} Colors */

const LEAST_LIVE_S = 10;
const calm = matchMedia('(prefers-reduced-motion: reduce)');

export class Face {
  #dirty = true;
  #wasActive = false;
  /** @type {Colors | null} */
  #ink = null;
  message = '';
  #summary = '';
  #wasLive = 0; // onset of the first note that still sounded at the last frame

  /** @param {Player} player */
  constructor(player) {
    this.player = player;
    this.roll = new Roll(player.canvas('roll'));
    const anew = () => { this.#ink = null; player.shelf.list.redraw(this.colors()); this.touch(); };
    new ResizeObserver(anew).observe(player.root);
    new MutationObserver(anew).observe(document.body, { attributes: true, attributeFilter: ['class'] });
    requestAnimationFrame(() => this.#frame());
  }

  /** Draw anew at the next frame. */
  touch() { this.#dirty = true; }

  colors() {
    if (this.#ink) return this.#ink;
    const style = getComputedStyle(this.player.root), pick = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
    return (this.#ink = {
      prompt: pick('--prompt-note'), generated: pick('--generated-note'), sounding: pick('--sounding-note'), pedal: pick('--prompt-note'),
      text: pick('--body-text-color-subdued'), line: pick('--border-color-primary'), shade: pick('--background-fill-secondary'),
    });
  }

  #frame() {
    const { playback, recording, duet, root } = this.player;
    if (!root.isConnected) return;
    const active = playback.playing || recording.active || duet.active;
    if (active || this.#wasActive || this.#dirty) { // once more when it has ended by itself
      this.#dirty = false;
      this.#wasActive = active;
      this.#draw();
    }
    requestAnimationFrame(() => this.#frame());
  }

  /** What is being played now; null if nothing is. @returns {{score: Score, pedals: [number, number][], until: number} | null} */
  #live() {
    const { recording, duet } = this.player, now = performance.now();
    if (duet.active) return duet.picture;
    if (!recording.active) return null;
    const { recorder } = recording;
    return { score: new Score(recorder.notes(now)), pedals: recorder.pedals, until: recorder.length(now) };
  }

  #draw() {
    const { player } = this, { playback, viewport, shown, region, duet } = player, live = this.#live();
    const { score, until, pedals } = live ?? shown, at = live ? live.until : playback.position;
    if (live) { viewport.resize(Math.max(until, duet.active ? LEAST_LIVE_S : 0)); this.roll.forget(this.#settled(live.score)); }
    if (playback.playing || live) viewport.follow(at, calm.matches);
    const isPrompt = live ? !duet.active : shown.kind === 'prompt';
    this.roll.draw({
      score, until, growing: !live && shown.growing, at, sounding: playback.sounding, region: live ? null : region, pedals,
      message: player.language.translate(live ? 'Play …' : this.message), outside: isPrompt,
      turns: isPrompt ? [{ from: 0, to: Infinity }] : live ? [] : shown.turns,
    }, viewport, this.colors());
    if (this.roll.stretched) this.touch();
    this.#drawKeys(at);
    this.#write(at, until, score.notes.length);
    this.#writeForReaders(at, until, score.notes.length);
    this.#placeEdges();
  }

  /** Since when the notes may be others than at the last frame. @param {Score} score */
  #settled(score) {
    const from = this.#wasLive;
    const open = score.notes.findIndex((note) => note.off >= score.end - 0.001);
    this.#wasLive = open < 0 ? 0 : score.notes[open].on;
    return Math.min(from, this.#wasLive);
  }

  /** @param {number} at */
  #drawKeys(at) {
    const { playback, shown, instrument, keys, duet } = this.player;
    /** @type {Map<number, boolean>} */
    const lit = new Map();
    if (playback.sounding)
      for (const note of shown.score.between(at, at + 0.001)) lit.set(note.pitch + playback.transpose, at < shown.join);
    for (const pitch of duet.sounding.keys()) lit.set(pitch, false);
    for (const pitch of instrument.held.keys()) lit.set(pitch, true);
    keys.draw(lit, this.colors());
  }

  /** @param {number} at @param {number} until @param {number} count of notes */
  #write(at, until, count) {
    const { player } = this, { playback, shown, recording, viewport } = player, generating = player.generating;
    Object.assign(player.root.dataset, {
      kind: shown.kind, notes: count, position: at.toFixed(2), playing: playback.sounding, generating, recording: recording.active, duet: player.duet.active,
      take: shown.id, from: viewport.from.toFixed(3), span: viewport.span.toFixed(3), stored: player.shelf.takes.stored,
    });
    const play = player.button('play');
    play.textContent = playback.playing ? '❚❚' : '▶';
    play.setAttribute('aria-label', playback.playing ? 'Pause' : 'Play');
    play.disabled = !count;
    player.button('continue').disabled = !count || generating || at < 0.2 || recording.active || player.duet.active;
    player.button('loop').disabled = !count || shown.kind === 'prompt' || recording.active || player.duet.active;
    player.button('fill').hidden = player.root.dataset.fills !== 'true';
    player.button('fill').disabled = !player.region || shown.kind !== 'piece' || generating || player.duet.active;
    player.find('time').textContent = `${clock(at)} / ${clock(until)}`;
    player.find('count').textContent = count ? `${count.toLocaleString('en')} notes` : '';
    player.find('waiting').hidden = !playback.waiting;
    player.find('midi').hidden = !count || recording.active || player.duet.active;
    player.button('record').setAttribute('aria-pressed', String(recording.active));
    player.button('record').textContent = recording.active ? '■ Stop recording' : '● Record';
    player.button('duet').setAttribute('aria-pressed', String(player.duet.active));
    player.button('duet').textContent = player.duet.active ? '■ End the duet' : 'Duet';
    player.find('pause-label').hidden = !player.duet.active;
    player.button('record').disabled = player.duet.active;
    player.button('duet').disabled = recording.active || generating;
    player.button('pedal').setAttribute('aria-pressed', String(player.instrument.pedalDown));
  }

  /** @param {number} at @param {number} until @param {number} count of notes */
  #writeForReaders(at, until, count) {
    const { player } = this, roll = player.canvas('roll'), { shown } = player;
    roll.setAttribute('aria-valuemax', until.toFixed(1));
    roll.setAttribute('aria-valuenow', at.toFixed(1));
    roll.setAttribute('aria-valuetext', `${clock(at)} of ${clock(until)}`);
    const continues = shown.kind === 'piece' && shown.join > 0;
    const summary = !count ? 'Nothing yet.' : continues ? `${count} notes in ${clock(until)}, of which the prompt is ${clock(shown.join)}.` : `${count} notes in ${clock(until)}.`;
    if (summary !== this.#summary) player.find('spoken').textContent = this.#summary = summary;
  }

  #placeEdges() {
    const { player } = this, { region, viewport, shown } = player, width = player.canvas('roll').clientWidth;
    for (const edge of player.edges()) {
      edge.hidden = !region || player.recording.active;
      if (!region) continue;
      const isStart = edge.dataset.edge === 'from', at = isStart ? region.from : region.to, x = viewport.x(at, width);
      edge.style.left = `${x}px`;
      edge.style.visibility = x < -8 || x > width + 8 ? 'hidden' : '';
      edge.setAttribute('aria-valuemin', String(isStart ? 0 : region.from));
      edge.setAttribute('aria-valuemax', String(isStart ? region.to : shown.until));
      edge.setAttribute('aria-valuenow', String(at));
      edge.setAttribute('aria-valuetext', `${at.toFixed(1)} of ${shown.until.toFixed(1)} seconds`);
    }
  }
}
