// Package suite has what the runs of Kubernetes' own suites need: images, servers outside of the
// nodes, and results.
package suite

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
	"regexp"
	"slices"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// RegistryName is the registry of the suite's images. The test runs a registry with this name.
const RegistryName = "registry.k8s.io"

// image is a replacement of one of the suite's images.
type image struct {
	files   []engines.File
	changes []string // lines of a Dockerfile
}

const (
	searchPath = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	shell      = `CMD ["sh"]`
)

// images returns replacements by the name of the suite's images. They consist of programs built
// from the source of the suite, busybox, and our tools.
func images(tb engines.TB, set string) map[string]image {
	tb.Helper()
	base := baseFiles(tb)
	agnhost := append(slices.Clip(base), program(tb, set, "agnhost", "agnhost", 0o755),
		engines.File{Header: tar.Header{Name: "agnhost-2", Typeflag: tar.TypeSymlink, Linkname: "agnhost"}})
	shells := image{base, []string{shell}}

	// image volumes of these contain a file that names a picture, and the release of Alpine Linux
	volume := func(picture string) image {
		files := []engines.File{
			textFile("data.json", `{"image": "`+picture+`"}`), textFile("etc/os-release", "NAME=\"Alpine Linux\"\n"),
		}
		return image{append(slices.Clip(agnhost), files...), []string{`ENTRYPOINT ["/agnhost"]`, `CMD ["pause"]`}}
	}

	return map[string]image{
		"agnhost":           {agnhost, []string{`ENTRYPOINT ["/agnhost"]`, `CMD ["pause"]`}},
		"nginx":             {agnhost, []string{`ENTRYPOINT ["/agnhost"]`, `CMD ["netexec", "--http-port=80"]`}},
		"pause":             {agnhost, []string{`ENTRYPOINT ["/agnhost", "pause"]`}},
		"kitten":            volume("kitten.jpg"),
		"nautilus":          volume("nautilus.jpg"),
		"busybox":           shells,
		"ipc-utils":         shells,
		"glibc-dns-testing": shells,
		"nonroot":           {base, []string{"USER 1234", shell}},
		"nonewprivs": {
			append(slices.Clip(base), program(tb, set, "nonewprivs", "usr/local/bin/nnp", 0o4755)),
			[]string{`CMD ["nnp"]`},
		},
	}
}

// baseFiles returns the files of all images.
func baseFiles(tb engines.TB) []engines.File {
	tb.Helper()
	certificate, key := selfSigned(tb)
	tools := []string{"curl", "bash", "dig", "getent", "nc"}
	files := engines.BusyboxFilesOf(tb, filepath.Join(engines.Cache(), "busybox", "busybox"))
	files = slices.DeleteFunc(files, func(f engines.File) bool {
		dir, name := filepath.Split(f.Header.Name)
		return dir == "bin/" && slices.Contains(tools, name)
	})
	files = append(files,
		engines.File{Header: tar.Header{Name: "uploads/", Typeflag: tar.TypeDir, Mode: 0o1777}},
		engines.File{
			Header:  tar.Header{Name: "tools", Mode: 0o755},
			Content: build(tb, "cri-dockerd/test/suite/tools"),
		})
	for _, tool := range tools {
		files = append(files, engines.File{Header: tar.Header{
			Name:     "bin/" + tool,
			Typeflag: tar.TypeSymlink,
			Linkname: "/tools",
		}})
	}

	for name, content := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" +
			"user-defined-in-image:x:1000:1000::/home:/bin/sh\n",
		"etc/group": "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n" +
			"group-defined-in-image:x:50000:user-defined-in-image\n",
		"localhost.crt": string(certificate),
		"localhost.key": string(key),
	} {
		files = append(files, textFile(name, content))
	}

	return files
}

// textFile returns a file of an image.
func textFile(name, content string) engines.File {
	return engines.File{Header: tar.Header{Name: name, Mode: 0o644}, Content: []byte(content)}
}

// program returns a program from hack/kubernetes.sh as a file of an image.
func program(tb engines.TB, set, name, path string, mode int64) engines.File {
	tb.Helper()
	b, err := os.ReadFile(engines.KubernetesProgram(tb, set, name))
	if err != nil {
		tb.Fatalf("images: %v", err)
	}
	return engines.File{Header: tar.Header{Name: path, Mode: mode}, Content: b}
}

// imageLine matches an image in the source of the suite.
var imageLine = regexp.MustCompile(`Config\{list\.(PromoterE2eRegistry|GcRegistry), "(\S+)", "(\S+)"\}`)

// LoadImages creates the images of the suite, in the versions of its source, and pushes them to the
// registry, because some tests pull images. set is the argument of hack/kubernetes.sh that builds
// the programs of the images. Each tag has a different image ID, because some tests distinguish
// images by ID.
func LoadImages(tb engines.TB, n *nodes.Node, set string) {
	tb.Helper()
	source, err := os.ReadFile(filepath.Join(engines.KubernetesSource(tb), "test/utils/image/manifest.go"))
	if err != nil {
		tb.Fatalf("images: %v", err)
	}

	known := images(tb, set)
	for _, m := range imageLine.FindAllStringSubmatch(string(source), -1) {
		registry, name, tag := m[1], m[2], m[3]
		i, ok := known[name]
		if !ok {
			continue
		}

		ref := RegistryName + "/" + name + ":" + tag
		if registry == "PromoterE2eRegistry" {
			ref = RegistryName + "/e2e-test-images/" + name + ":" + tag
		}

		changes := append([]string{searchPath, "LABEL tag=" + name + ":" + tag}, i.changes...)
		engines.Import(tb, n.Path("/run/docker.sock"), ref, i.files, changes...)
		n.Run(tb, "docker", "push", "-q", ref)
	}
}

// selfSigned returns a certificate for localhost and its key, in PEM, as part of the suite's image.
// The clients of the suite do not verify it.
func selfSigned(tb engines.TB) (certificate, key []byte) {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("images: %v", err)
	}

	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}

	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		tb.Fatalf("images: %v", err)
	}

	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		tb.Fatalf("images: %v", err)
	}

	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// build returns a static program built from this repository.
func build(tb engines.TB, path string) []byte {
	tb.Helper()
	dir, err := os.MkdirTemp("", "cri-suite-")
	if err != nil {
		tb.Fatalf("build: %v", err)
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
		tb.Fatalf("build %s: %v\n%s", path, err, out)
	}

	return program
}
