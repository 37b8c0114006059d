// Quasar's script looks for Vue among the globals, so the order of these is fixed.
import * as Vue from "./vue.js";

window.Vue = Vue;
await import("./quasar.js");
await import("./page.js");
