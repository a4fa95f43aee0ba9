// Elements and words, for the page of a report and for the index of the sidecar's page: the
// scripts behind this one see what is declared here. Text from elsewhere becomes text of an
// element (textContent), never markup.
"use strict";

const $ = id => document.getElementById(id);

// With what is not seen, or turns text around, as codes.
const shown = text => String(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu,
  c => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

function number(value, digits = 6) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  const text = Number(value).toPrecision(digits);
  return size !== 0 && (size < 1e-4 || size >= 1e9) ? String(Number(value).toExponential(digits - 1)).replace(/\.?0+e/, "e")
    : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
const brief = value => number(value, 4);
