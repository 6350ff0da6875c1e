// Draws a piano roll on a canvas. The notes are drawn once into tiles, so that an hour of music scrolls smoothly.

import { clock } from './notes.js';

/** @typedef {import('./notes.js').Score} Score */
/** @typedef {import('./notes.js').Note} Note */
/** @typedef {import('./viewport.js').Viewport} Viewport */
/** @typedef {{prompt: string, generated: string, sounding: string, text: string, line: string, shade: string, pedal: string}} Colors */
/** @typedef {{from: number, to: number}} Region */
/**
 * What to draw.
 * @typedef {{
 *   score: Score, until: number, growing: boolean, at: number, sounding: boolean, message: string,
 *   turns: Region[], pedals: [number, number][], region: Region | null, outside: boolean,
 * }} Picture
 * `turns`: what a human played. `outside`: whether what is outside the region is left out.
 */

const TILE = 512; // width in CSS pixels
const MOST_TILES = 48;
const SETTLED_MS = 120; // since the last zoom
export const RULER = 18; // height of the times, and of the pedal above them
const PEDAL = 6;
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600];

/**
 * Fit a canvas to its place on the page; its pen, in CSS pixels.
 * @param {HTMLCanvasElement} canvas
 */
export function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height, ratio };
}

/**
 * Draw the notes between two times over a whole picture.
 * @param {CanvasRenderingContext2D} pen
 * @param {Score} score
 * @param {{from: number, span: number, width: number, height: number, range: [number, number]}} place
 * @param {(note: Note) => string} color
 */
export function drawNotes(pen, score, { from, span, width, height, range: [low, high] }, color) {
  const tall = height / (high - low + 1), scale = width / span;
  const drawnTo = new Float64Array(128).fill(-1); // so that of many notes on one pixel only the first is drawn
  for (const note of score.between(from, from + span)) {
    const x = (note.on - from) * scale, right = x + Math.max(1.5, (note.off - note.on) * scale - 0.5);
    if (right - drawnTo[note.pitch] < 0.5) continue;
    drawnTo[note.pitch] = right;
    pen.fillStyle = color(note);
    pen.globalAlpha = 0.45 + 0.55 * Math.min(1, note.velocity / 100);
    const y = (high - note.pitch) * tall;
    if (right - x < 5) { // round corners would not be seen, and take ten times as long
      pen.fillRect(x, y, right - x, Math.max(2, tall - 1));
      continue;
    }
    pen.beginPath();
    pen.roundRect(x, y, right - x, Math.max(2, tall - 1), Math.min(2, tall / 3));
    pen.fill();
  }
  pen.globalAlpha = 1;
}

export class Roll {
  /** @type {Map<number, HTMLCanvasElement>} by number, from the left */
  #tiles = new Map();
  #drawnAs = ''; // what all tiles have in common

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) { this.canvas = canvas; }

  /** Draw the notes anew that begin at this time or later, or reach it. @param {number} from */
  forget(from) {
    if (from <= 0) this.#tiles.clear();
    for (const number of this.#tiles.keys()) if ((number + 1) * this.#tileSpan > from) this.#tiles.delete(number);
  }

  #tileSpan = 1;
  #wantedSpan = 1;
  #zoomedAt = 0;
  /** Whether the tiles are stretched, and to be drawn anew when the user no longer zooms. */
  stretched = false;

  /** Seconds in a tile: while the user zooms, those of the tiles there are, unless they got far too large or small. @param {number} wanted */
  #spanOfTiles(wanted) {
    const now = performance.now(), ratio = wanted / this.#tileSpan;
    if (wanted !== this.#wantedSpan) this.#zoomedAt = now;
    this.#wantedSpan = wanted;
    this.stretched = ratio !== 1 && ratio > 0.5 && ratio < 2 && this.#tiles.size > 0 && now - this.#zoomedAt < SETTLED_MS;
    return this.stretched ? this.#tileSpan : wanted;
  }

  /** @param {Picture} picture @param {Viewport} viewport @param {Colors} ink */
  draw(picture, viewport, ink) {
    const { pen, width, height, ratio } = prepare(this.canvas);
    if (!width) return;
    const bottom = height - RULER - PEDAL, x = (/** @type {number} */ seconds) => viewport.x(seconds, width);
    if (!picture.score.notes.length) {
      pen.font = '15px system-ui, sans-serif';
      pen.textAlign = 'center';
      pen.fillStyle = ink.text;
      lines(picture.message, pen, width - 24).forEach((line, n) => pen.fillText(line, width / 2, height / 2 + 20 * n));
      if (!picture.sounding) return;
    }
    const range = picture.score.range();
    pen.fillStyle = ink.shade;
    for (const { from, to } of picture.turns) pen.fillRect(x(from), 0, x(to) - x(from), bottom);
    this.#ruler(pen, viewport, ink, width, height);
    this.#drawTiles(pen, picture, viewport, ink, { width, height: bottom, ratio, range });
    this.#sounding(pen, picture, x, ink, bottom, range);
    pen.fillStyle = ink.pedal;
    for (const [from, to] of picture.pedals)
      if (x(to) > 0 && x(from) < width) pen.fillRect(x(from), bottom + 1, Math.max(1, x(to) - x(from)), PEDAL - 2);
    if (picture.region) region(pen, picture.region, picture.outside, x, ink, width, bottom);
    if (picture.growing && x(picture.until) < width) dashed(pen, x(picture.until), bottom, ink.generated);
    pen.fillStyle = ink.sounding;
    pen.fillRect(x(picture.at) - 1, 0, 2, height - RULER);
  }

  /**
   * @param {CanvasRenderingContext2D} pen @param {Picture} picture @param {Viewport} viewport @param {Colors} ink
   * @param {{width: number, height: number, ratio: number, range: [number, number]}} size
   */
  #drawTiles(pen, picture, viewport, ink, { width, height, ratio, range }) {
    const span = this.#spanOfTiles((TILE / width) * viewport.span);
    const drawnAs = [span, height, ratio, ink.prompt, ink.generated, ...range].join();
    if (drawnAs !== this.#drawnAs) { this.#tiles.clear(); this.#drawnAs = drawnAs; this.#tileSpan = span; }
    const wide = (span / viewport.span) * width, last = Math.floor((viewport.from + viewport.span) / span);
    for (let number = Math.floor(viewport.from / span); number <= last; number++) {
      const tile = this.#tiles.get(number) ?? this.#tile(number, picture, ink, { width: TILE, height, ratio, range });
      pen.drawImage(tile, viewport.x(number * span, width), 0, wide, height);
    }
    for (const number of this.#tiles.keys()) { // the oldest first
      if (this.#tiles.size <= MOST_TILES) break;
      this.#tiles.delete(number);
    }
  }

  /**
   * @param {number} number @param {Picture} picture @param {Colors} ink
   * @param {{width: number, height: number, ratio: number, range: [number, number]}} size
   */
  #tile(number, { score, turns }, ink, { width, height, ratio, range }) {
    const tile = document.createElement('canvas');
    tile.width = Math.round(width * ratio);
    tile.height = Math.max(1, Math.round(height * ratio));
    const pen = /** @type {CanvasRenderingContext2D} */ (tile.getContext('2d'));
    pen.scale(ratio, ratio);
    drawNotes(pen, score, { from: number * this.#tileSpan, span: this.#tileSpan, width, height, range }, (note) =>
      (note.human ?? turns.some(({ from, to }) => from - 0.005 <= note.on && note.on < to - 0.005)) ? ink.prompt : ink.generated);
    this.#tiles.set(number, tile);
    return tile;
  }

  /**
   * Draw the notes that sound over their tiles.
   * @param {CanvasRenderingContext2D} pen @param {Picture} picture @param {(seconds: number) => number} x
   * @param {Colors} ink @param {number} height @param {[number, number]} range
   */
  #sounding(pen, { score, at, sounding }, x, ink, height, [low, high]) {
    if (!sounding) return;
    const tall = height / (high - low + 1);
    pen.fillStyle = ink.sounding;
    for (const note of score.between(at, at + 0.001)) {
      const left = x(note.on);
      pen.fillRect(left, (high - note.pitch) * tall, Math.max(1.5, x(note.off) - left - 0.5), Math.max(2, tall - 1));
    }
  }

  /** @param {CanvasRenderingContext2D} pen @param {Viewport} viewport @param {Colors} ink @param {number} width @param {number} height */
  #ruler(pen, viewport, ink, width, height) {
    const step = STEPS.find((each) => (each / viewport.span) * width >= 60) ?? 1200;
    pen.font = '11px system-ui, sans-serif';
    pen.textAlign = 'left';
    for (let n = Math.ceil(viewport.from / step); n * step <= viewport.from + viewport.span; n++) {
      const x = viewport.x(n * step, width);
      pen.fillStyle = ink.line;
      pen.fillRect(x, 0, 1, height - RULER);
      pen.fillStyle = ink.text;
      if (x < width - 26) pen.fillText(step < 1 ? (n * step).toFixed(1) : clock(n * step), x + 3, height - 5);
    }
  }
}

/**
 * @param {CanvasRenderingContext2D} pen @param {Region} region @param {boolean} outside
 * @param {(seconds: number) => number} x @param {Colors} ink @param {number} width @param {number} bottom
 */
function region(pen, { from, to }, outside, x, ink, width, bottom) {
  const [left, right] = [x(from), x(to)];
  pen.fillStyle = outside ? ink.shade : ink.generated;
  pen.globalAlpha = outside ? 0.82 : 0.12;
  if (outside) {
    pen.fillRect(0, 0, left, bottom);
    pen.fillRect(right, 0, width - right, bottom);
  } else pen.fillRect(left, 0, right - left, bottom);
  pen.globalAlpha = 1;
  pen.fillStyle = ink.generated;
  pen.fillRect(left - 1, 0, 3, bottom);
  pen.fillRect(right - 2, 0, 3, bottom);
}

/** @param {CanvasRenderingContext2D} pen @param {number} x @param {number} bottom @param {string} color */
function dashed(pen, x, bottom, color) {
  pen.strokeStyle = color;
  pen.setLineDash([3, 3]);
  pen.beginPath();
  pen.moveTo(x, 0);
  pen.lineTo(x, bottom);
  pen.stroke();
  pen.setLineDash([]);
}

/** @param {string} text @param {CanvasRenderingContext2D} pen @param {number} width @returns {string[]} */
function lines(text, pen, width) {
  const rows = [''];
  for (const word of text.split(/(?<= )|(?<=[\u3040-\u9fff、。])(?![、。」）])/)) { // Japanese has no spaces
    const longer = rows[rows.length - 1] + word;
    if (pen.measureText(longer.trimEnd()).width <= width) rows[rows.length - 1] = longer; else rows.push(word);
  }
  return rows.map((row) => row.trimEnd());
}
