package main

import (
	"archive/tar"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// Registry of the suite's images. The test runs its own registry with this name.
const (
	registryName = "registry.k8s.io"
	suiteImages  = registryName + "/e2e-test-images/"
)

// loadImages creates the images of the suite from agnhost, built from the source of the suite, and
// from busybox. It also pushes them to the registry, because some tests pull images. Each tag has a
// different image ID, because some tests distinguish images by ID.
func loadImages(h *engines.Program, n *nodes.Node, built string) {
	agnhost, err := os.ReadFile(filepath.Join(built, "agnhost"))
	if err != nil {
		h.Fatalf("images: %v", err)
	}

	users := engines.File{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Content: []byte(
		"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" +
			"user-defined-in-image:x:1000:1000::/home:/bin/sh\n")}
	groups := engines.File{Header: tar.Header{Name: "etc/group", Mode: 0o644}, Content: []byte(
		"root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n" +
			"group-defined-in-image:x:50000:user-defined-in-image\n")}
	base := append(engines.BusyboxFiles(h), users, groups,
		engines.File{Header: tar.Header{Name: "tools", Mode: 0o755}, Content: build(h, "./test/nodeconformance/tools")},
		engines.File{Header: tar.Header{Name: "uploads/", Typeflag: tar.TypeDir, Mode: 0o1777}})
	for _, tool := range []string{"nmeter", "curl", "bash"} {
		base = append(base, engines.File{Header: tar.Header{
			Name:     "bin/" + tool,
			Typeflag: tar.TypeSymlink,
			Linkname: "/tools",
		}})
	}

	certificate, key := selfSigned(h)
	base = append(base, engines.File{Header: tar.Header{Name: "localhost.crt", Mode: 0o644}, Content: certificate},
		engines.File{Header: tar.Header{Name: "localhost.key", Mode: 0o644}, Content: key})
	with := append(base[:len(base):len(base)],
		engines.File{Header: tar.Header{Name: "agnhost", Mode: 0o755}, Content: agnhost},
		engines.File{Header: tar.Header{Name: "agnhost-2", Typeflag: tar.TypeSymlink, Linkname: "agnhost"}})
	load := func(ref string, files []engines.File, changes ...string) {
		engines.Import(h, n.Path("/run/docker.sock"), ref, files, changes...)
		n.Run(h, "docker", "push", "-q", ref)
	}

	const path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, ref := range []string{"agnhost:2.63.0", "agnhost:2.55"} {
		load(suiteImages+ref, with, path, "LABEL tag="+ref, `ENTRYPOINT ["/agnhost"]`, `CMD ["pause"]`)
	}

	for _, ref := range []string{"nginx:1.15-4", "nginx:1.27-0"} {
		load(suiteImages+ref, with, path, "LABEL tag="+ref, `ENTRYPOINT ["/agnhost"]`,
			`CMD ["netexec", "--http-port=80"]`)
	}

	for _, ref := range []string{"busybox:1.37.0-1", "ipc-utils:1.4", "glibc-dns-testing:2.0.0"} {
		load(suiteImages+ref, base, path, "LABEL tag="+ref, `CMD ["sh"]`)
	}

	load(suiteImages+"nonroot:1.5", base, path, "USER 1234", `CMD ["sh"]`)
	load(registryName+"/pause:3.10.2", with, path, `ENTRYPOINT ["/agnhost", "pause"]`)
}

// selfSigned returns a certificate for localhost and its key, in PEM, as part of the suite's image.
// The clients of the suite do not verify it.
func selfSigned(h *engines.Program) (certificate, key []byte) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		h.Fatalf("images: %v", err)
	}

	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}

	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		h.Fatalf("images: %v", err)
	}

	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		h.Fatalf("images: %v", err)
	}

	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// build returns a static program built from this repository.
func build(h *engines.Program, path string) []byte {
	dir, err := os.MkdirTemp("", "nodeconformance-")
	if err != nil {
		h.Fatalf("build: %v", err)
	}
	defer os.RemoveAll(dir)

	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/program", path)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	var program []byte
	if err == nil {
		program, err = os.ReadFile(dir + "/program")
	}

	if err != nil {
		h.Fatalf("build %s: %v\n%s", path, err, out)
	}

	return program
}
