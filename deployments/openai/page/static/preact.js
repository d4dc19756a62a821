// The one place that names the library.

export {
  html, render, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState,
} from "./vendor/preact/htm-preact.js";
