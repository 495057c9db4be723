// Waits for an operation with gRPC's own client for Node; prints each answer as a line of JSON.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, name, ...includeDirs] = process.argv.slice(2);
const files = ["defuse/v1/gateway_service.proto", "google/longrunning/operations_proto.proto"];
const loaded = grpc.loadPackageDefinition(loader.loadSync(files, { includeDirs, keepCase: true }));
const credentials = grpc.credentials.createInsecure();
const gateway = new loaded.defuse.v1.GatewayService(address, credentials);
const operations = new loaded.google.longrunning.Operations(address, credentials);

function print(error, answer) {
  console.log(JSON.stringify(error ? { code: error.code, details: error.details } : answer));
  return !error;
}

gateway.GetVersion({}, (error, answer) => {
  if (!print(error, answer)) return;
  operations.GetOperation({ name: `${name}-of-nobody` }, (error) => {
    print(error);
    operations.WaitOperation({ name }, { deadline: Date.now() + 240_000 }, print);
  });
});
