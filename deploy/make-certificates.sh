#!/bin/sh
# Make an authority and a certificate for each service in ./certificates, for development: every key can be read by all.
set -eu
out=${1:-certificates}
days=365
mkdir -p "$out"
cd "$out"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" \
    -subj "/CN=Defuse development" -keyout authority.key -out authority.pem 2>/dev/null

for name in redis triton generator distiller corrector gateway client; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$name" -keyout "$name.key" \
        -out "$name.csr" 2>/dev/null
    printf 'subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1\n' "$name" > "$name.ext"
    openssl x509 -req -in "$name.csr" -CA authority.pem -CAkey authority.key -CAcreateserial -days "$days" \
        -extfile "$name.ext" -out "$name.pem" 2>/dev/null
    rm "$name.csr" "$name.ext"
done
chmod a+r ./*.key
rm authority.srl
echo "authority.pem and a certificate of each service are in $PWD"
