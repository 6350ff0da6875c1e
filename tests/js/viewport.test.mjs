import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Viewport } from '../../app/web/player/viewport.js';

test('zooming keeps the place under the pointer, and stays within the piece', () => {
  const view = new Viewport();
  view.resize(60);
  view.showAll();
  assert.deepEqual([view.from, view.span], [0, 60]);
  view.zoom(30, 2);
  assert.deepEqual([view.from, view.span, view.x(30, 100)], [15, 30, 50]);
  view.zoom(15, 3);
  assert.equal(view.x(15, 100), 0);
  view.zoom(20, 1e9);
  assert.equal(view.span, 0.5);
  view.zoom(20, 1e-9);
  assert.deepEqual([view.from, view.span], [0, 60]);
});

test('scrolling ends at the edges, and stops following', () => {
  const view = new Viewport();
  view.resize(60);
  view.zoom(0, 6);
  view.follow(30, false);
  assert.equal(view.from, 26.5);
  view.scroll(1000);
  assert.equal(view.from, 50);
  view.follow(0, false);
  assert.equal(view.from, 50, 'the user has scrolled away');
  view.scroll(-1000);
  assert.equal(view.from, 0);
});

test('a piece that grows stays in view until the user zooms', () => {
  const view = new Viewport();
  view.resize(20);
  view.resize(40);
  assert.equal(view.span, 40);
  view.zoom(0, 2);
  view.resize(80);
  assert.equal(view.span, 20);
});

test('with little motion the view moves by pages', () => {
  const view = new Viewport();
  view.resize(100);
  view.zoom(0, 10);
  view.follow(9, true);
  assert.equal(view.from, 0);
  view.follow(10.5, true);
  assert.equal(view.from, 10);
});

test('pixels and seconds are inverse, and clipped to the piece', () => {
  const view = new Viewport();
  view.resize(100);
  view.place(20, 10);
  assert.equal(view.seconds(view.x(23, 640), 640), 23);
  assert.equal(view.seconds(-1e6, 640), 0);
  assert.equal(view.seconds(1e6, 640), 100);
});

test('what is to be seen ends with the piece', () => {
  const view = new Viewport();
  view.resize(4.26);
  assert.deepEqual(view.visible, { from: 0, to: 4.3 });
  view.resize(100);
  view.place(20.04, 5);
  assert.deepEqual(view.visible, { from: 20, to: 25 });
});
