// What mouse, fingers, wheel and trackpad do on the timeline.

/** @typedef {import('./viewport.js').Viewport} Viewport */

const LEAST_DRAG_PX = 5;
export const LEAST_REGION_S = 0.2;

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Viewport} viewport
 * @param {{
 *   seek: (seconds: number) => void,
 *   selecting: (from: number, to: number, done: boolean) => void,
 *   moved: () => void,
 * }} on `selecting` while a region is drawn; `moved` when the view has changed.
 */
export function listen(canvas, viewport, on) {
  /** @type {Map<number, {x: number, start: number, kind: string}>} by pointer */
  const pointers = new Map();
  let moving = false; // whether what began as a press has become a drag

  const left = () => canvas.getBoundingClientRect().left;
  const width = () => canvas.clientWidth;
  const seconds = (/** @type {number} */ clientX) => viewport.seconds(clientX - left(), width());

  canvas.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    try { canvas.setPointerCapture(event.pointerId); } catch { /* the finger is up already */ }
    if (!pointers.size) moving = false;
    pointers.set(event.pointerId, { x: event.clientX, start: event.clientX, kind: event.pointerType });
    if (pointers.size > 1) moving = true;
  });

  canvas.addEventListener('pointermove', (event) => {
    const pointer = pointers.get(event.pointerId);
    if (!pointer) return;
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, each]) => each);
    if (others.length) pinch(pointer, event.clientX, others[0].x);
    else if (moving || Math.abs(event.clientX - pointer.start) > LEAST_DRAG_PX) {
      moving = true;
      if (pointer.kind === 'touch') {
        viewport.scroll(((pointer.x - event.clientX) / width()) * viewport.span);
        on.moved();
      } else on.selecting(...ordered(seconds(pointer.start), seconds(event.clientX)), false);
    }
    pointer.x = event.clientX;
  });

  canvas.addEventListener('pointerup', (event) => {
    const pointer = pointers.get(event.pointerId);
    pointers.delete(event.pointerId);
    if (!pointer || pointers.size) return;
    if (!moving) on.seek(seconds(event.clientX));
    else if (pointer.kind !== 'touch') on.selecting(...ordered(seconds(pointer.start), seconds(event.clientX)), true);
  });
  canvas.addEventListener('pointercancel', (event) => pointers.delete(event.pointerId));

  canvas.addEventListener('wheel', (event) => {
    const by = Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.deltaY;
    if (event.ctrlKey || event.metaKey) { // also a pinch on a trackpad
      viewport.zoom(seconds(event.clientX), 1.01 ** -Math.max(-60, Math.min(event.deltaY, 60)));
    } else {
      const before = viewport.from;
      viewport.scroll((by / width()) * viewport.span);
      if (viewport.from === before) return; // at an end: the page scrolls
    }
    event.preventDefault();
    on.moved();
  }, { passive: false });

  // Safari tells of a pinch on a trackpad by events of its own, not by a wheel with Ctrl.
  let scale = 1;
  canvas.addEventListener('gesturestart', (event) => { scale = 1; event.preventDefault(); });
  canvas.addEventListener('gesturechange', (event) => {
    event.preventDefault();
    const { scale: now, clientX } = /** @type {Event & {scale: number, clientX: number}} */ (event);
    if (pointers.size) return; // on a phone, the fingers are told of as pointers too
    viewport.zoom(seconds(clientX), now / scale);
    scale = now;
    on.moved();
  });

  /** @param {{x: number}} finger @param {number} x @param {number} other */
  function pinch(finger, x, other) {
    const [before, after] = [Math.abs(finger.x - other), Math.abs(x - other)];
    if (before > 10 && after > 10) viewport.zoom(seconds((x + other) / 2), after / before);
    viewport.scroll((((finger.x - x) / 2) / width()) * viewport.span);
    on.moved();
  }
}

/** @param {number} a @param {number} b @returns {[number, number]} */
const ordered = (a, b) => (a < b ? [a, b] : [b, a]);
