// A client of convserve in JavaScript: `node client.js HOST:PORT PNG` prints what it saw as JSON.

"use strict";

const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PROTO = path.join(__dirname, "../../../proto");
const [target, file] = process.argv.slice(2);
const digit = fs.readFileSync(file);
const credentials = process.env.TLS_CA
  ? grpc.credentials.createSsl(
      fs.readFileSync(process.env.TLS_CA),
      process.env.TLS_KEY && fs.readFileSync(process.env.TLS_KEY),
      process.env.TLS_CERT && fs.readFileSync(process.env.TLS_CERT),
    )
  : grpc.credentials.createInsecure();

function service(name, proto) {
  const definition = loader.loadSync(path.join(PROTO, proto), { longs: Number, enums: String });
  const found = name.split(".").reduce((at, part) => at[part], grpc.loadPackageDefinition(definition));
  return new found(target, credentials);
}

const classifier = service("convserve.v1.Classifier", "classify.proto");
const inference = service("inference.GRPCInferenceService", "open_inference.proto");

function metadata(size = 0) {
  const made = new grpc.Metadata();
  if (process.env.TOKEN) made.set("authorization", `Bearer ${process.env.TOKEN}`);
  if (size) made.set("x-large", "x".repeat(size));
  return made;
}

function call(client, method, request, options = {}, size = 0) {
  return new Promise((resolve) => {
    const deadline = Date.now() + (options.ms ?? 20000);
    const made = client[method](request, metadata(size), { deadline }, (error, response) =>
      resolve(error ? { code: error.code, details: error.details } : { code: 0, response }),
    );
    if (options.cancel) setImmediate(() => made.cancel());
  });
}

const request = { model: "lenet5", images: [{ encoded: digit }] };

// The size of a request as a stream, which is answered in order.
function stream(count) {
  return new Promise((resolve, reject) => {
    const ids = [];
    const made = inference.ModelStreamInfer(metadata(), { deadline: Date.now() + 20000 });
    made.on("data", (one) => ids.push(one.inferResponse ? one.inferResponse.id : one.errorMessage));
    made.on("error", reject);
    made.on("end", () => resolve(ids));
    for (let id = 0; id < count; id++) {
      const input = { name: "image", datatype: "UINT8", shape: [1, 32, 32, 1] };
      const pixels = Buffer.alloc(1024);
      made.write({ modelName: "lenet5", id: `${id}`, inputs: [input], rawInputContents: [pixels] });
    }
    made.end();
  });
}

async function main() {
  const seen = {};
  const one = await call(classifier, "Classify", request);
  seen.class = one.response ? one.response.results[0].classes[0].index : one;
  const many = await Promise.all(
    Array.from({ length: 300 }, () => call(classifier, "Classify", request)),
  );
  seen.many = many.filter((answer) => answer.code === 0).length;
  seen.unknownModel = (await call(classifier, "Classify", { ...request, model: "none" })).code;
  seen.invalid = (await call(classifier, "Classify", { model: "lenet5" })).code;
  seen.past = (await call(classifier, "Classify", request, { ms: -1 })).code;
  seen.cancelled = (await call(classifier, "Classify", request, { cancel: true })).code;
  seen.largeMetadata = (await call(classifier, "Classify", request, {}, 7000)).code;
  seen.live = (await call(inference, "ServerLive", {})).response.live;
  seen.stream = await stream(20);
  console.log(JSON.stringify(seen));
  classifier.close();
  inference.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
