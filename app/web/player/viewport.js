// Which part of the piece the timeline shows. Nothing here touches the page. All times are in seconds.

const LEAST_SPAN_S = 0.5;
const LEAST_WHOLE_S = 10;

export class Viewport {
  from = 0;
  span = LEAST_WHOLE_S;
  length = 0;
  /** Whether the view moves along with the music; not any more once the user has scrolled. */
  follows = true;

  /** The longest span worth showing. */
  get whole() { return Math.max(LEAST_WHOLE_S, this.length); }

  /** Another length of the piece: it grows, or another is shown. @param {number} length */
  resize(length) {
    const showedAll = this.span >= this.whole - 0.01;
    this.length = length;
    if (showedAll && this.fits) this.span = this.whole;
    this.place(this.from, this.span);
  }

  /** Whether the whole piece is to be seen as it grows; false once the user has zoomed. */
  fits = true;

  /** The part of the piece that is to be seen, to a tenth of a second. */
  get visible() {
    const tenth = (/** @type {number} */ seconds) => Math.round(10 * seconds) / 10;
    return { from: tenth(this.from), to: tenth(Math.min(this.from + this.span, this.length)) };
  }

  /** Show the whole piece. */
  showAll() { this.fits = true; this.place(0, this.whole); }

  /** @param {number} from @param {number} span */
  place(from, span) {
    this.span = Math.max(LEAST_SPAN_S, Math.min(span, this.whole));
    this.from = Math.max(0, Math.min(from, this.whole - this.span));
  }

  /** Zoom by a factor, in if it is above 1, around a time that stays where it is. @param {number} at @param {number} factor */
  zoom(at, factor) {
    this.fits = false;
    const span = Math.max(LEAST_SPAN_S, Math.min(this.span / factor, this.whole));
    this.place(at - ((at - this.from) / this.span) * span, span);
  }

  /** @param {number} seconds */
  scroll(seconds) {
    this.follows = false;
    this.place(this.from + seconds, this.span);
  }

  /**
   * Keep a time in view: a third from the left or, by pages, where it is until it leaves.
   * @param {number} at
   * @param {boolean} byPages for those who prefer little motion
   */
  follow(at, byPages) {
    if (!this.follows) return;
    if (!byPages) this.place(at - 0.35 * this.span, this.span);
    else if (at < this.from || at > this.from + this.span) this.place(at - 0.05 * this.span, this.span);
  }

  /** @param {number} seconds @param {number} width of the picture */
  x(seconds, width) { return ((seconds - this.from) / this.span) * width; }

  /** @param {number} x @param {number} width */
  seconds(x, width) { return Math.max(0, Math.min(this.from + (x / width) * this.span, this.length)); }
}
