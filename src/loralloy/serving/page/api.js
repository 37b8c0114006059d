// The server's API, as any client uses it. The key stays in this tab: never in an address, gone when the tab is closed.

const KEY = "loralloy-key";

/** What went wrong, in the server's own words. */
export class ApiError extends Error {
  constructor(message, status = 0, position = null, code = null) {
    super(message);
    this.status = status; // 0: the server was not reached
    this.position = position; // in a composition, from 0
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

let askForKey = () => {};
/** Called when the server wants a key, or another one. */
export const onKeyWanted = (callback) => (askForKey = callback);

async function send(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // a key with characters that no header can carry fails here too
    throw new ApiError(/header|ByteString/i.test(error.message) ? "This key cannot be sent." : "The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let told = {};
  try {
    told = (await response.json()).error || {};
  } catch {
    // not JSON: a proxy's own answer
  }
  let message = told.message || `The server answered ${response.status}.`;
  const wait = response.headers.get("retry-after");
  if (response.status === 429 || response.status === 503) message = `${message}. Try again${wait ? ` in ${wait} s` : " later"}.`;
  throw new ApiError(message, response.status, told.position ?? null, told.code ?? null);
}

export const get = async (path, signal) => (await send(path, null, signal)).json();
export const post = async (path, body, signal) => (await send(path, body, signal)).json();

/** Whether the server can read a composition; ApiError says what is wrong, and where. */
export const check = (model, signal) => {
  const path = `v1/models/${encodeURIComponent(model)}`;
  // servers and proxies read 8 KiB of an address; a routed composition can be longer
  return path.length <= 4000 ? get(path, signal) : post("v1/compositions", { model }, signal);
};

/** The events of a streamed answer, as objects. Raises ApiError, also for an error within the stream or its early end. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection broke off.");
    }
    if (read.done) throw new ApiError("The answer broke off.");
    rest += read.value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new ApiError(said.error.message);
      yield said;
    }
  }
}
